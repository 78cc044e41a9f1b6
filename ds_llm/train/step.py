"""The figures of a training step: of a micro-batch, of a rank, and of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ds_llm.data.batches import count_processed, count_tokens
from ds_llm.engine.engine import Engine
from ds_llm.engine.processes import all_reduce


class MicroStep(NamedTuple):
    """The output of an objective for a micro-batch. A named tuple, because DeepSpeed wraps the tensors of an output.

    The first four are those of `ds_llm.models.head.LMLoss`. loss_sum: scalar, summed over the units that `Job.count`
    counts. aux_loss: scalar, averaged over the micro-batches of the global batch. aux_report (scalar) and expert_counts
    [layers, E] are None without experts. figures [len(Job.metrics)]: sums of these metrics, None without metrics.
    """

    loss_sum: Tensor
    aux_loss: Tensor
    aux_report: Tensor | None = None
    expert_counts: Tensor | None = None
    figures: Tensor | None = None


class Counted(NamedTuple):
    """Counts of a global batch.

    valid: units with loss. tokens: tokens with loss. processed: tokens without padding. stop: somebody asked a process
    to stop.
    """

    valid: float
    tokens: float
    processed: float
    stop: bool


def count_batches(engine: Engine, batches: Sequence[dict[str, Tensor]], count: Callable, stop: bool) -> Counted:
    """Count the global batch in one collective. batches: of this rank. count: `Job.count`.

    stop: whether this process was asked to stop.
    """
    mine = [sum(map(counter, batches)) * engine.layout.counts for counter in (count, count_tokens, count_processed)]
    valid, tokens, processed, stops = all_reduce([*mine, float(stop)])
    return Counted(valid, tokens, processed, stops > 0)


@dataclass(frozen=True)
class StepFigures:
    """Figures of a step over all ranks.

    loss, metrics (by name): per counted unit. aux_loss, aux_report: per micro-batch. expert_load: share of the tokens
    that each expert got, [layers][E]. aux_report and expert_load are None without experts.
    """

    loss: float
    aux_loss: float
    metrics: dict[str, float]
    aux_report: float | None
    expert_load: list[list[float]] | None


@dataclass
class StepSums:
    """Sums over a step's micro-batches on this rank. metrics: names of the figures of each `MicroStep`."""

    metrics: tuple[str, ...]
    losses: list[Tensor] = field(default_factory=list)  # of each micro-batch, float64 scalars
    aux_loss: Tensor | float = 0.0
    aux_report: Tensor | float = 0.0
    figures: Tensor | None = None
    expert_counts: Tensor | None = None

    def add(self, found: MicroStep) -> None:
        """Add a micro-batch."""
        self.losses.append(found.loss_sum.detach().double())
        self.aux_loss += found.aux_loss.detach().double()
        if found.figures is not None:
            figures = found.figures.detach().double().cpu()
            self.figures = figures if self.figures is None else self.figures + figures
        if found.expert_counts is not None:
            self.aux_report += found.aux_report.detach().double()
            counts = found.expert_counts.double()
            self.expert_counts = counts if self.expert_counts is None else self.expert_counts + counts

    def reduce(self, engine: Engine, valid: float, parts: int) -> StepFigures:
        """Sum over the ranks in one collective. valid: counted units of the global batch; parts: its micro-batches."""
        groups = {
            "loss": [float(sum(self.losses))],
            "aux_loss": [float(self.aux_loss)],
            "aux_report": [float(self.aux_report)],
            "metrics": self.figures.tolist() if self.figures is not None else [],
            "expert_counts": self.expert_counts.flatten().tolist() if self.expert_counts is not None else [],
        }
        summed = iter(engine.total([value for group in groups.values() for value in group]))
        total = {name: [next(summed) for _ in group] for name, group in groups.items()}
        report = load = None
        if self.expert_counts is not None:
            report = total["aux_report"][0] / parts
            counts = torch.tensor(total["expert_counts"]).view(self.expert_counts.shape)
            load = (counts / counts.sum(-1, keepdim=True).clamp_min(1)).tolist()
        return StepFigures(
            loss=total["loss"][0] / max(valid, 1),
            aux_loss=total["aux_loss"][0] / parts,
            metrics={n: value / max(valid, 1) for n, value in zip(self.metrics, total["metrics"], strict=True)},
            aux_report=report,
            expert_load=load,
        )
