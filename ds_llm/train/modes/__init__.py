"""One file per training mode: how its model, data and loss are built.

A mode is a module with `check(config) -> Data`, which reads and checks everything that can be wrong before processes
meet, and `build(config, data) -> Job`, which makes the model. `Data.fingerprint` is a flat dictionary that names the
training data: a continued run must have the same. `Data.tokenizer` is the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ds_llm.data.batches import Samples, count_tokens


@dataclass
class Job:
    """What a mode hands to the trainer.

    `objective(**batch)` returns the `MicroStep` of a micro-batch, with sums of what `metrics` names; the trainer
    divides the loss and these sums by `count(batch)` over the global batch: how many of `unit` (token, pair) it holds.
    `evaluate(engine)` returns the figures of an evaluation, `goal` among them, of which the lowest is the best;
    `sample(engine)` a list of {"prompt", "text"}. `prepare(engine, stop)` runs before training, while the engine still
    holds the start model; it calls the collective `stop()` now and then and returns False where that says to end. Every
    rank calls all three, or they are None. `begin_step(engine, batches, valid)`, collective too, sees this rank's
    micro-batches of a step before their forward passes; valid: what `count` gives of the global batch. The scheduled
    learning rate is multiplied by `lr_factor`; `info` is recorded with the run's start.
    """

    model: nn.Module
    objective: nn.Module
    tokenizer: Any
    samples: Samples
    seq_len: int
    evaluate: Callable | None
    sample: Callable | None
    prepare: Callable | None = None
    begin_step: Callable[[Any, list[dict[str, torch.Tensor]], float], None] | None = None
    count: Callable[[dict[str, torch.Tensor]], int] = count_tokens
    unit: str = "token"
    metrics: tuple[str, ...] = ()
    goal: str = "perplexity"
    lr_factor: float = 1.0
    info: dict[str, Any] = field(default_factory=dict)
