"""Groups of ranks: neighbouring ranks share a row, a weight or the experts of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_llm.config.sections import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """The groups of rank `rank` among `world` ranks: `expert`, `sequence` and `tensor` neighbouring ranks form a group.

    Ranks of a tensor group compute the same figures; ranks of a sequence group compute parts of the same rows.
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
        """Number of ranks, or of tensor groups, that compute different figures."""
        return self.world // self.tensor

    @property
    def replica(self) -> int:
        return self.rank // self.tensor

    @property
    def batches(self) -> int:
        """Number of micro-batches that are computed at the same time."""
        return self.world // (self.tensor * self.sequence)

    @property
    def batch(self) -> int:
        """Index of this process's micro-batch among `batches`."""
        return self.rank // (self.tensor * self.sequence)

    @property
    def counts(self) -> bool:
        """Whether this process is the one of its tensor group whose figures are summed."""
        return self.rank % self.tensor == 0


def neighbours(size: int) -> dist.ProcessGroup:
    """This rank's group of `size` neighbouring ranks. Collective."""
    world = dist.get_world_size()
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    return groups[dist.get_rank() // size]


class Exchange(torch.autograd.Function):
    """All-to-all exchange of rows in a group, with the reverse exchange of gradients."""

    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        """rows [sum(sent), ...], ordered by destination rank -> [sum(received), ...], ordered by source rank."""
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
    """The sum over the ranks of a group, where each rank uses the sum in its own loss."""

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
