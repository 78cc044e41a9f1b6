"""Metrics of a sample in a model's forward pass, and the interface for new ones.

A metric is a class that `register` knows by its name. It gets a `Batch`: the backbone's output (hidden states, router
logits) for sequences whose tokens are at known rows, and the entropy and log-probability of every scored token. It
returns one value per sample and column. Any number of metrics share one forward pass.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ds_llm.errors import UserError

DIGITS = 7  # significant ones of a score: what single precision carries


@dataclass
class Sample:
    """Tokens of a sample: `input_ids` int [n], and `scored` bool [n] (not shifted), the tokens that count.

    The tokens before a token predict it, so the first one never counts.
    """

    input_ids: np.ndarray
    scored: np.ndarray

    def __post_init__(self):
        if self.input_ids.ndim != 1 or self.input_ids.shape != self.scored.shape:
            raise ValueError(f"expected ids and scored [n], got {self.input_ids.shape} and {self.scored.shape}")

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def targets(self) -> np.ndarray:
        """Positions of the tokens that count, int64 [scored], ascending; position 0 is never among them."""
        return np.flatnonzero(self.scored[1:]) + 1


@dataclass
class Batch:
    """The result of one forward pass for N sequences.

    samples: the sequences. starts: int64 [N]; the tokens of sequence i are the rows `starts[i]` to
    `starts[i] + len(samples[i]) - 1` of `hidden` and of everything else that has a row per token; rows between them are
    padding. output: what the model's backbone returned, with what the metrics' `options` asked for. entropy, logprob:
    float64 [scored], in nats, of the scored tokens of all sequences one after the other; None where no metric needs
    them.
    """

    samples: list[Sample]
    starts: np.ndarray | None = None
    output: object = None
    entropy: np.ndarray | None = None
    logprob: np.ndarray | None = None

    @property
    def hidden(self) -> Tensor:
        """Last hidden states [rows, H], after the final norm, on the model's device."""
        return self.output.last_hidden_state.flatten(0, 1)

    @cached_property
    def counts(self) -> np.ndarray:
        """Scored tokens of each sequence, int64 [N]."""
        return np.array([len(sample.targets) for sample in self.samples], dtype=np.int64)

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """Values of scored tokens [scored] by sequence."""
        return np.split(values, np.cumsum(self.counts)[:-1])

    def select(self, indices: Sequence[int]) -> Batch:
        """Entropy and log-probability of some of the sequences."""
        entropy, logprob = self.split(self.entropy), self.split(self.logprob)
        return Batch(
            [self.samples[i] for i in indices],
            entropy=np.concatenate([entropy[i] for i in indices]),
            logprob=np.concatenate([logprob[i] for i in indices]),
        )

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean of values [scored] over each sequence's scored tokens: float64 [N], NaN where there are none."""
        return np.array([part.mean() if len(part) else math.nan for part in self.split(values)])

    def token_mean(self, values: Tensor) -> Tensor:
        """Mean of values [rows, ...] over all tokens of each sequence: [N, ...]; 0 for a sequence without tokens."""
        lengths = torch.tensor([len(sample) for sample in self.samples])
        owner = torch.repeat_interleave(lengths)
        within = torch.arange(len(owner)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        rows = torch.from_numpy(self.starts)[owner] + within
        owner, rows, lengths = (t.to(values.device) for t in (owner, rows, lengths))
        sums = values.new_zeros(len(self.samples), *values.shape[1:]).index_add_(0, owner, values[rows])
        return sums / lengths.clamp_min(1).view(-1, *[1] * (values.dim() - 1))


def number(value: float) -> float | None:
    """A score as stored: `DIGITS` significant digits; None for NaN and infinity, which JSON lacks."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


class Metric(ABC):
    """Base of all metrics. `config` is the model's transformers configuration.

    name: what the user writes. statistics: needs `Batch.entropy` and `Batch.logprob`. unconditional: needs a second
    pass over the scored tokens without what precedes them. tokens: the attribute of `Batch` that holds its value for
    each scored token, where it has one. options: keyword arguments of the backbone's forward. arrays: columns beside
    those of `columns` that hold an array, of one shape for all samples; each goes to a file of its own, in half
    precision. A class raises `UserError` in its constructor for a model that it cannot measure.
    """

    name: ClassVar[str]
    statistics: ClassVar[bool] = True
    unconditional: ClassVar[bool] = False
    tokens: ClassVar[str | None] = None
    options: ClassVar[dict] = {}
    arrays: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config):
        self.config = config

    def columns(self) -> dict[str, pa.DataType]:
        """Names and types of the columns that hold a number."""
        return {self.name: pa.float64()}

    @abstractmethod
    def measure(self, batch: Batch, unconditional: Batch | None) -> dict[str, list]:
        """A list of one value per sample for each column, and float16 [N, ...] for each of `arrays`, NaN where a value
        is not finite. `unconditional`: sequence i is what `without_prompt` gives of sample i; None where no metric of
        the run needs it."""


METRICS: dict[str, type[Metric]] = {}


def register(metric: type[Metric]) -> type[Metric]:
    """Class decorator that registers a metric by its name."""
    METRICS[metric.name] = metric
    return metric


@register
class Entropy(Metric):
    """Mean entropy in nats of the distributions that predict the scored tokens, -sum_v p_v log p_v; 0 without any."""

    name = tokens = "entropy"

    def measure(self, batch: Batch, unconditional: Batch | None) -> dict[str, list]:
        means = np.where(batch.counts > 0, batch.mean(batch.entropy), 0.0)
        return {"entropy": [number(value) for value in means]}


@register
class LogProb(Metric):
    """Mean log-probability of the scored tokens in nats; null without any."""

    name = tokens = "logprob"

    def measure(self, batch: Batch, unconditional: Batch | None) -> dict[str, list]:
        return {"logprob": [number(value) for value in batch.mean(batch.logprob)]}


@register
class Perplexity(Metric):
    """exp(-mean log-probability) of the scored tokens; null without any."""

    name = "perplexity"

    def measure(self, batch: Batch, unconditional: Batch | None) -> dict[str, list]:
        with np.errstate(over="ignore"):
            return {"perplexity": [number(value) for value in np.exp(-batch.mean(batch.logprob))]}


@register
class InstructionFollowingDifficulty(Metric):
    """Mean loss of the answer given its prompt / mean loss of the answer alone (Li et al., "From Quantity to Quality",
    arXiv:2308.12032); above 1 the prompt does not help. Both means are over the same tokens: alone, the answer stands
    behind the tokenizer's beginning-of-text token, or its end-of-text token. null without an answer."""

    name = "ifd"
    unconditional = True

    def measure(self, batch: Batch, unconditional: Batch | None) -> dict[str, list]:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = batch.mean(batch.logprob) / unconditional.mean(unconditional.logprob)
        return {"ifd": [number(value) for value in ratios]}


def create(names: Sequence[str], config) -> list[Metric]:
    """The metrics of these names for a model of this configuration. `UserError` for an unknown or repeated name."""
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"metric '{name}': must be one of {', '.join(METRICS)}{hint}")
    if len(set(names)) < len(names) or not names:
        raise UserError("name each metric once, and at least one")
    return [METRICS[name](config) for name in names]


def without_prompt(sample: Sample, prefix: int) -> Sample:
    """The scored tokens of a sample alone, behind the token `prefix`."""
    ids = np.concatenate([[prefix], sample.input_ids[sample.targets]])
    return Sample(ids, np.arange(len(ids)) > 0)


def sequences(sample: Sample, metrics: Iterable[str], prefix: int) -> list[Sample]:
    """The sequences that the model computes for a sample: itself and, for metrics that need it, its answer alone."""
    twice = any(METRICS[name].unconditional for name in metrics)
    return [sample, without_prompt(sample, prefix)] if twice else [sample]


def cost(sample: Sample, metrics: Iterable[str]) -> int:
    """Tokens that pass through the model for a sample."""
    return sum(map(len, sequences(sample, metrics, 0)))
