"""Which process does which part of the work: neighbouring ranks share a row, a weight or the experts of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_llm.config.sections import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """The place of process `rank` among `world`. Groups of `expert`, `sequence` and `tensor` ranks are neighbours.

    Ranks of a tensor group compute the same; those of a sequence group compute parts of the same rows.
    """

    rank: int
    world: int
    expert: int = 1
    sequence: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Layout:
        return cls(dist.get_rank(), dist.get_world_size(), parallel.expert, parallel.sequence, parallel.tensor)

    @property
    def replicas(self) -> int:
        """Processes that compute different things: all, or tensor groups."""
        return self.world // self.tensor

    @property
    def replica(self) -> int:
        return self.rank // self.tensor

    @property
    def batches(self) -> int:
        """Micro-batches that are in work at a time."""
        return self.world // (self.tensor * self.sequence)

    @property
    def batch(self) -> int:
        """Which of them this process works on."""
        return self.rank // (self.tensor * self.sequence)

    @property
    def counts(self) -> bool:
        """Whether this process speaks for its tensor group where figures are added up."""
        return self.rank % self.tensor == 0


def neighbours(size: int) -> dist.ProcessGroup:
    """This rank's group of `size` neighbouring ranks; every rank must call it."""
    world = dist.get_world_size()
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    return groups[dist.get_rank() // size]


class Exchange(torch.autograd.Function):
    """Rows to every rank of a group and from it (all-to-all); gradients go the way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        """rows [sum(sent), ...], in the order of the ranks they go to -> [sum(received), ...], in that of origin."""
        ctx.splits, ctx.group = (received, sent), group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _all_to_all(grad, *ctx.splits, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    found = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
    return found


class Total(torch.autograd.Function):
    """The sum over the ranks of a group, of which each uses it in a loss of its own."""

    @staticmethod
    def forward(ctx, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum(value, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _sum(grad, ctx.group), None


def _sum(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    value = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(value, group=group)
    return value
