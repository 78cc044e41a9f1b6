"""What a training mode hands over: a job to the trainer, figures to sweeps, samples to `prepare.py show`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ds_llm.data.batches import Samples, count_tokens
from ds_llm.data.order import Order


@dataclass
class Job:
    """Everything the trainer needs from a mode.

    objective(**batch): returns the `MicroStep` of a micro-batch, with sums of the figures that `metrics` names. The
    trainer divides the loss and these sums by the sum of `count(batch)` over the global batch, a number of `unit`s
    (token, pair). evaluate(engine): figures of an evaluation, among them `goal`, of which the lowest is the best.
    sample(engine): a list of {"prompt", "text"}. prepare(engine, stop): runs before training, while the engine holds
    the start model; calls the collective `stop()` from time to time and returns False where it returns True.
    begin_step(engine, batches, valid): gets this rank's micro-batches before their forward passes; valid: the counted
    units of the global batch. These four are collective, or None. order: of the samples; None: all of them once in an
    epoch, shuffled by `train.seed`. lr_factor: multiplies the scheduled learning rate.
    info: recorded at the run's start.
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
    order: Order | None = None
    count: Callable[[dict[str, torch.Tensor]], int] = count_tokens
    unit: str = "token"
    metrics: tuple[str, ...] = ()
    goal: str = "perplexity"
    lr_factor: float = 1.0
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch."""
        return len(self.samples) if self.order is None else self.order.samples


class Figures(NamedTuple):
    """Names of the mode's own figures in the records of evaluations and of steps."""

    evaluated: Sequence[str]
    steps: Sequence[str]


class Shown(NamedTuple):
    """Prepared samples, as `prepare.py show` prints them.

    count: number of samples. parts(i): title, ids int64 [n] and shifted labels int64 [n] of each sequence of sample i.
    report: what happened to the rows, one line or `Supervised.report`.
    """

    count: int
    parts: Callable[[int], Iterable[tuple[str, np.ndarray, np.ndarray]]]
    report: str | dict
