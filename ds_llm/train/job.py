"""What a training mode hands over: a job to the trainer, figures to sweeps, samples to `prepare.py show`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
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


class Figures(NamedTuple):
    """Names of what evaluations and steps record beside what they do in every mode."""

    evaluated: Sequence[str]
    steps: Sequence[str]


class Shown(NamedTuple):
    """Prepared samples for the eye: how many there are; `parts(i)`, of sample i the titles, ids int64 [n] and labels
    int64 [n] (shifted) of what it is trained on; what became of the rows, one line or `Supervised.report`."""

    count: int
    parts: Callable[[int], Iterable[tuple[str, np.ndarray, np.ndarray]]]
    report: str | dict
