"""One file per training mode: how its model, data and loss are built.

A mode is an entry in `ds_llm.config.modes` and a module here of the same name, with `check(config) -> Data`, which
reads and checks everything that can be wrong before processes meet, and `build(config, data) -> Job`, which makes the
model. `Data.fingerprint` is a flat dictionary that names the training data: a continued run must have the same.
`Data.tokenizer` is the model's. Where the entry says so the module also has `shown(data) -> Shown` and
`figures(config) -> Figures`; these types are in `ds_llm.train.job`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def module(name: str) -> ModuleType:
    """The module of a mode, imported when it is asked for: DeepSpeed takes seconds."""
    return import_module(f"{__name__}.{name}")
