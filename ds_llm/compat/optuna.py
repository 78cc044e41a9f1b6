"""optuna 5.0: names of its modules, and the number under which its storage knows a trial.

`NAMES`: each such name, the module it lies in and what it is for.
"""

from __future__ import annotations

from ds_llm.compat.names import lookup

NAMES = {
    "JournalStorage": ("optuna.storages", "keeps a study in a file"),
    "JournalFileBackend": ("optuna.storages.journal", "that file"),
    "PedAnovaImportanceEvaluator": ("optuna.importance", "importance of parameters"),
    "get_param_importances": ("optuna.importance", "importance of parameters"),
}


def trial_id(trial) -> int:
    """The number under which the study's storage knows a trial, which `optuna.trial.Trial` asks for."""
    return trial._trial_id


__getattr__ = lookup("optuna", NAMES)
