"""lm-eval 0.4.13: names of its modules.

`NAMES`: each such name, the module it lies in and what it is for.
"""

from __future__ import annotations

from ds_llm.compat.names import lookup

NAMES = {
    "evaluate": ("lm_eval.evaluator", "runs tasks on a model object"),
    "TaskManager": ("lm_eval.tasks", "finds tasks, also in local files"),
    "HFLM": ("lm_eval.models.huggingface", "base of the model that answers requests"),
    "get_rolling_token_windows": ("lm_eval.utils", "windows of a long text"),
    "make_disjoint_window": ("lm_eval.utils", "the same without overlap"),
}

__getattr__ = lookup("lm-eval", NAMES)
