"""Stable counting sort of chosen experts, in three small passes and without a general sort.

A histogram per block of choices, one running sum over (expert, block), and the rank of each choice among the equal ones
of its block. Integer additions only, so the result does not vary between runs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ._triton import jit, launch_on, next_power_of_2, tl, triton, uses_triton

SORT_BLOCK = 256  # choices per program
RANK_CHUNK = 16  # choices that a block compares itself with at a time


# --- torch reference


def _sort_reference(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    flat = experts.reshape(-1)
    masked = (flat < 0) | (flat >= num_experts)
    bucket = torch.where(masked, num_experts, flat)
    if bucket.device.type == "cpu" and num_experts < 1 << 15:
        # NumPy sorts 16-bit integers by counting, several times as fast as torch's comparisons
        order = torch.from_numpy(np.argsort(bucket.to(torch.int16).numpy(), kind="stable"))
    else:
        order = bucket.argsort(stable=True)
    place = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    place = torch.empty_like(place).scatter_(0, order, place)
    counts = torch.bincount(bucket, minlength=num_experts + 1)[:num_experts]
    return counts.cumsum(0).int(), torch.where(masked, ~place, place).view(experts.shape)


# --- Triton kernels


@jit
def _buckets(experts, slot, slots, NUM_EXPERTS: tl.constexpr):
    """The experts of some choices; NUM_EXPERTS for masked ones, -1 behind the last."""
    e = tl.load(experts + slot, mask=slot < slots, other=-1).to(tl.int32)
    return tl.where(slot < slots, tl.where((e >= 0) & (e < NUM_EXPERTS), e, NUM_EXPERTS), -1)


@jit
def _count_kernel(experts, counts, slots, blocks, NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """counts[e, block]: how often bucket e occurs in the block."""
    block = tl.program_id(0)
    bucket = _buckets(experts, block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK), slots, NUM_EXPERTS)
    # the last bin takes what stands behind the last choice
    count = tl.histogram(tl.where(bucket < 0, BINS - 1, bucket), BINS)
    e = tl.arange(0, BINS)
    tl.store(counts + e.to(tl.int64) * blocks + block, count, mask=e <= NUM_EXPERTS)


@jit
def _place_kernel(
    experts, before, inverse, slots, blocks, NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """inverse[slot] = running count before the block + rank in the block, `~` of it where masked."""
    block = tl.program_id(0)
    first = block.to(tl.int64) * BLOCK
    local = tl.arange(0, BLOCK)
    bucket = _buckets(experts, first + local, slots, NUM_EXPERTS)
    inside = bucket >= 0
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, BLOCK, CHUNK):
        other = start + tl.arange(0, CHUNK)
        same = _buckets(experts, first + other, slots, NUM_EXPERTS)[None, :] == bucket[:, None]
        rank += tl.sum((same & (other[None, :] < local[:, None])).to(tl.int32), 1)
    place = rank + tl.load(before + bucket.to(tl.int64) * blocks + block, mask=inside, other=0)
    tl.store(inverse + first + local, tl.where(bucket < NUM_EXPERTS, place, ~place), mask=inside)


def sort_triton(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Offsets [E] and inverse [T, K], both int32, of contiguous experts [T, K]."""
    slots = experts.numel()
    blocks = triton.cdiv(slots, SORT_BLOCK)
    inverse = torch.empty(experts.shape, dtype=torch.int32, device=experts.device)
    counts = torch.empty(num_experts + 1, blocks, dtype=torch.int32, device=experts.device)
    bins = next_power_of_2(num_experts + 2)
    if not slots:
        return counts.new_zeros(num_experts), inverse
    with launch_on(experts):
        _count_kernel[(blocks,)](
            experts, counts, slots, blocks, NUM_EXPERTS=num_experts, BINS=bins, BLOCK=SORT_BLOCK, num_warps=4
        )
        total = counts.view(-1).cumsum(0, dtype=torch.int32).view_as(counts)
        before = total - counts
        _place_kernel[(blocks,)](
            experts,
            before,
            inverse,
            slots,
            blocks,
            NUM_EXPERTS=num_experts,
            BLOCK=SORT_BLOCK,
            CHUNK=RANK_CHUNK,
            num_warps=4,
        )
    return total[:num_experts, -1].contiguous(), inverse


# --- operator


@torch.library.custom_op("ds_llm::moe_sort", mutates_args=())
def sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Offsets [E] and inverse [T, K], both int32, of experts [T, K]; see `moe_permute.permute` for their meaning."""
    if uses_triton(experts):
        return sort_triton(experts.contiguous(), num_experts)
    return _sort_reference(experts, num_experts)


@sort.register_fake
def _(experts, num_experts):
    return experts.new_empty(num_experts, dtype=torch.int32), experts.new_empty(experts.shape, dtype=torch.int32)


def compile_specs() -> list:
    from .compile_check import CompileSpec

    specs = []
    for num_experts in (8, 64, 512):
        for index in ("i32", "i64"):
            sort = {"NUM_EXPERTS": num_experts, "BLOCK": SORT_BLOCK}
            signature = {"experts": f"*{index}", "slots": "i32", "blocks": "i32"}
            bins = next_power_of_2(num_experts + 2)
            for fn, name, own, extra in (
                (_count_kernel, "count", {"counts": "*i32"}, {"BINS": bins}),
                (_place_kernel, "place", {"before": "*i32", "inverse": "*i32"}, {"CHUNK": RANK_CHUNK}),
            ):
                label = f"permute sort {name} {num_experts} experts {index}"
                specs.append(CompileSpec(label, fn, signature | own, sort | extra))
    return specs
