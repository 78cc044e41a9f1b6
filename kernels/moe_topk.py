"""Triton kernels of `moe_routing.route`: scores, top-k, renormalisation and statistics in one pass, and its backward.

A program holds the logits of a few tokens in registers; each of the K rounds takes the largest that is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, launch_on, next_power_of_2, tl

EPSILON = 1e-20  # added to the sums that scores are divided by
TILE = 1024  # logits per step of a program
STEPS = 2  # steps per program at least: each program writes E counts and E sums
PROGRAMS = 1024  # of the forward pass at most: several per multiprocessor
SUM_CHUNKS, SUM_EXPERTS = 128, 8  # tile of the kernel that adds the sums of the programs


@jit
def _group_range(bounds, group, groups, tokens, length):
    """First token of a sequence and the one behind its last; the first and the last reach to the ends."""
    if bounds is None:
        start = group.to(tl.int64) * length
        end = start + length
    else:
        start = tl.where(group == 0, 0, tl.load(bounds + group)).to(tl.int64)
        end = tl.where(group == groups - 1, tokens, tl.load(bounds + group + 1)).to(tl.int64)
    return start, end


@jit
def _route_kernel(
    logits,
    bias,
    mask,
    bounds,
    weights,
    experts,
    counts,
    scores,
    z,
    valid_tokens,
    tokens,
    length,
    logits_t,
    logits_e,
    mask_t,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program of grid (sequences, chunks) takes every chunks-th tile of its sequence; the sums are per program."""
    group, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    start, end = _group_range(bounds, group, tl.num_programs(0), tokens, length)
    expert = tl.arange(0, BLOCK_E)[None, :]
    choice = tl.arange(0, BLOCK_K)[None, :]
    count_sum = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    score_sum = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    z_sum = tl.zeros((BLOCK_T,), tl.float32)
    valid_sum = tl.zeros((BLOCK_T,), tl.int32)
    for first in range(start + chunk * BLOCK_T, end, chunks * BLOCK_T):
        token = first + tl.arange(0, BLOCK_T).to(tl.int64)
        use = token < end
        x = tl.load(
            logits + token[:, None] * logits_t + expert.to(tl.int64) * logits_e,
            mask=use[:, None] & (expert < EXPERTS),
            other=-float("inf"),
        ).to(tl.float32)
        if mask is not None:
            use = use & (tl.load(mask + token * mask_t, mask=use, other=0) != 0)
        top = tl.max(x, 1)
        top = tl.where(top > -float("inf"), top, 0.0)
        power = tl.exp(x - top[:, None])
        total = tl.sum(power, 1)
        lse = top + tl.log(total)
        if SIGMOID:
            score = 1 / (1 + tl.exp(-x))
            share = score / (tl.sum(score, 1) + EPS)[:, None]
        else:
            score = power / total[:, None]
            share = score
        key = x
        if bias is not None:
            key = tl.where(x == -float("inf"), x, score + tl.load(bias + expert, mask=expert < EXPERTS, other=0.0))
        # NaN comes first, as in torch.sort, so that it shows in the weights and every index is in range
        key = tl.where(key == key, key, float("inf"))
        weight = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        chosen = tl.full((BLOCK_T, BLOCK_K), -1, tl.int32)
        hit = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
        valid = token < 0
        for k in range(TOP_K):
            best, at = tl.max(key, 1, return_indices=True, return_indices_tie_break_left=True)
            found = use & (best > -float("inf"))
            valid = valid | found
            here = expert == at[:, None]
            picked = tl.sum(tl.where(here, score, 0.0), 1)
            weight = tl.where((choice == k) & found[:, None], picked[:, None], weight)
            chosen = tl.where((choice == k) & found[:, None], at[:, None].to(tl.int32), chosen)
            hit = tl.where(here & found[:, None], 1, hit)
            key = tl.where(here, -float("inf"), key)
        if NORMALIZE:
            weight = weight / (tl.sum(weight, 1) + EPS)[:, None]
        place = token[:, None] * TOP_K + choice
        store = (token < end)[:, None] & (choice < TOP_K)
        tl.store(weights + place, weight, mask=store)
        tl.store(experts + place, chosen, mask=store)
        count_sum += hit
        score_sum += tl.where(valid[:, None], share, 0.0)
        z_sum += tl.where(valid, lse * lse, 0.0)
        valid_sum += valid.to(tl.int32)
    row = (group * chunks + chunk).to(tl.int64)
    column = tl.arange(0, BLOCK_E)
    tl.store(counts + row * EXPERTS + column, tl.sum(count_sum, 0), mask=column < EXPERTS)
    tl.store(scores + row * EXPERTS + column, tl.sum(score_sum, 0), mask=column < EXPERTS)
    tl.store(z + row, tl.sum(z_sum, 0))
    tl.store(valid_tokens + row, tl.sum(valid_sum, 0))


@jit
def _sum_chunks_kernel(
    counts,
    scores,
    z,
    valid_tokens,
    counts_out,
    scores_out,
    z_out,
    valid_out,
    chunks,
    EXPERTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Adds the sums of the programs of `_route_kernel`, in a fixed order."""
    group, part = tl.program_id(0), tl.program_id(1)
    column = part * BLOCK_E + tl.arange(0, BLOCK_E)
    count_sum = tl.zeros((BLOCK_C, BLOCK_E), tl.int32)
    score_sum = tl.zeros((BLOCK_C, BLOCK_E), tl.float32)
    z_sum = tl.zeros((BLOCK_C,), tl.float32)
    valid_sum = tl.zeros((BLOCK_C,), tl.int32)
    for first in range(0, chunks, BLOCK_C):
        chunk = first + tl.arange(0, BLOCK_C)
        row = group.to(tl.int64) * chunks + chunk
        place = row[:, None] * EXPERTS + column[None, :]
        inside = (chunk < chunks)[:, None] & (column < EXPERTS)[None, :]
        count_sum += tl.load(counts + place, mask=inside, other=0)
        score_sum += tl.load(scores + place, mask=inside, other=0.0)
        z_sum += tl.load(z + row, mask=chunk < chunks, other=0.0)
        valid_sum += tl.load(valid_tokens + row, mask=chunk < chunks, other=0)
    place = group.to(tl.int64) * EXPERTS + column
    tl.store(counts_out + place, tl.sum(count_sum, 0), mask=column < EXPERTS)
    tl.store(scores_out + place, tl.sum(score_sum, 0), mask=column < EXPERTS)
    if part == 0:
        tl.store(z_out + group, tl.sum(z_sum, 0))
        tl.store(valid_out + group, tl.sum(valid_sum, 0))


@jit
def _route_backward_kernel(
    logits,
    experts,
    weights_grad,
    scores_grad,
    z_grad,
    bounds,
    grad,
    tokens,
    length,
    logits_t,
    logits_e,
    weights_t,
    weights_k,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    group, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    start, end = _group_range(bounds, group, tl.num_programs(0), tokens, length)
    expert = tl.arange(0, BLOCK_E)[None, :]
    if scores_grad is not None:
        place = group.to(tl.int64) * EXPERTS + expert
        share_grad = tl.load(scores_grad + place, mask=expert < EXPERTS, other=0.0)
        lse_grad = tl.load(z_grad + group)
    for first in range(start + chunk * BLOCK_T, end, chunks * BLOCK_T):
        token = first + tl.arange(0, BLOCK_T).to(tl.int64)
        inside = (token < end)[:, None] & (expert < EXPERTS)
        x = tl.load(
            logits + token[:, None] * logits_t + expert.to(tl.int64) * logits_e, mask=inside, other=-float("inf")
        ).to(tl.float32)
        top = tl.max(x, 1)
        top = tl.where(top > -float("inf"), top, 0.0)
        power = tl.exp(x - top[:, None])
        total = tl.sum(power, 1)
        softmax = power / total[:, None]
        if SIGMOID:
            score = 1 / (1 + tl.exp(-x))
        else:
            score = softmax
        hit = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
        hit_grad = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        valid = token < 0
        for k in tl.static_range(TOP_K):
            at = tl.load(experts + token * TOP_K + k, mask=token < end, other=-1)
            g = tl.load(weights_grad + token * weights_t + k * weights_k, mask=token < end, other=0.0)
            here = expert == at[:, None]
            hit = tl.where(here, 1, hit)
            hit_grad = tl.where(here, g[:, None], hit_grad)
            if k == 0:
                valid = at >= 0
        # score x its gradient through the weights
        flow = tl.where(hit != 0, score, 0.0)
        if NORMALIZE:
            flow = flow / (tl.sum(flow, 1) + EPS)[:, None]
            flow = flow * (hit_grad - tl.sum(flow * hit_grad, 1)[:, None])
        else:
            flow = flow * hit_grad
        if SIGMOID:
            if scores_grad is not None:
                share = score / (tl.sum(score, 1) + EPS)[:, None]
                flow += share * (share_grad - tl.sum(share * share_grad, 1)[:, None])
            out = flow * (1 / (1 + tl.exp(x)))
        else:
            if scores_grad is not None:
                flow += score * share_grad
            out = flow - score * tl.sum(flow, 1)[:, None]
        if scores_grad is not None:
            out += softmax * (2 * lse_grad * (top + tl.log(total)))[:, None]
        out = tl.where(valid[:, None], out, 0.0)
        tl.store(grad + token[:, None] * EXPERTS + expert, out.to(grad.dtype.element_ty), mask=inside)


def _config(experts: int, tokens: int, sequences: int, programs: int, steps: int) -> tuple[dict, int, int]:
    """Constants of the kernels, programs per sequence, warps."""
    block_e = next_power_of_2(experts)
    block_t = max(1, TILE // block_e)
    chunks = max(1, min(-(-tokens // (sequences * block_t * steps)), -(-programs // sequences)))
    return {"EXPERTS": experts, "EPS": EPSILON, "BLOCK_T": block_t, "BLOCK_E": block_e}, chunks, 4


def route_triton(
    logits: Tensor,
    top_k: int,
    sigmoid: bool,
    normalize: bool,
    bias: Tensor | None,
    mask: Tensor | None,
    bounds: Tensor | None,
    sequences: int,
) -> tuple[Tensor, ...]:
    tokens, experts = logits.shape
    constants, chunks, warps = _config(experts, tokens, sequences, PROGRAMS, STEPS)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    weights, chosen = empty(tokens, top_k), empty(tokens, top_k, dtype=torch.int32)
    counts, scores = empty(sequences, chunks, experts, dtype=torch.int32), empty(sequences, chunks, experts)
    z, valid = empty(sequences, chunks), empty(sequences, chunks, dtype=torch.int32)
    with launch_on(logits):
        _route_kernel[(sequences, chunks)](
            logits,
            None if bias is None else bias.contiguous(),
            None if mask is None else mask.view(torch.uint8),
            bounds,
            weights,
            chosen,
            counts,
            scores,
            z,
            valid,
            tokens,
            tokens // sequences,
            *logits.stride(),
            0 if mask is None else mask.stride(0),
            TOP_K=top_k,
            BLOCK_K=next_power_of_2(top_k),
            SIGMOID=sigmoid,
            NORMALIZE=normalize,
            **constants,
            num_warps=warps,
        )
        parts = (counts, scores, z, valid)
        if chunks == 1:
            stats = [part.squeeze(1) for part in parts]
        else:
            stats = [part.new_empty(part.shape[:1] + part.shape[2:]) for part in parts]
            _sum_chunks_kernel[(sequences, -(-experts // SUM_EXPERTS))](
                *parts, *stats, chunks, EXPERTS=experts, BLOCK_C=SUM_CHUNKS, BLOCK_E=SUM_EXPERTS, num_warps=4
            )
    return weights, chosen, *stats


def route_backward_triton(
    logits: Tensor,
    experts: Tensor,
    weights_grad: Tensor,
    scores_grad: Tensor | None,
    z_grad: Tensor | None,
    sigmoid: bool,
    normalize: bool,
    bounds: Tensor | None,
    sequences: int,
) -> Tensor:
    tokens, count = logits.shape
    grad = logits.new_empty(logits.shape)
    if (scores_grad is None) != (z_grad is None):
        zeros = logits.new_zeros(sequences, count, dtype=torch.float32)
        scores_grad, z_grad = zeros if scores_grad is None else scores_grad, zeros[:, 0] if z_grad is None else z_grad
    constants, chunks, warps = _config(count, tokens, sequences, 1 << 30, 1)
    if tokens:
        with launch_on(logits):
            _route_backward_kernel[(sequences, chunks)](
                logits,
                experts,
                weights_grad,
                None if scores_grad is None else scores_grad.contiguous(),
                None if z_grad is None else z_grad.contiguous(),
                bounds,
                grad,
                tokens,
                tokens // sequences,
                *logits.stride(),
                *weights_grad.stride(),
                TOP_K=experts.shape[1],
                SIGMOID=sigmoid,
                NORMALIZE=normalize,
                **constants,
                num_warps=warps,
            )
    return grad


def compile_specs() -> list:
    """Configurations to compile ahead of time: expert counts, dtypes and kinds of scoring of the models in use."""
    from .compile_check import CompileSpec

    specs = []
    outputs = {"weights": "*fp32", "experts": "*i32", "counts": "*i32", "scores": "*fp32", "z": "*fp32"}
    sizes = dict.fromkeys(["tokens", "length", "logits_t", "mask_t", "weights_t"], "i32")
    inputs = {"bias": "*fp32", "mask": "*u8", "bounds": "*i64", "valid_tokens": "*i32"}
    grads = {"weights_grad": "*fp32", "scores_grad": "*fp32", "z_grad": "*fp32"}
    for experts, top_k in ((8, 2), (64, 8), (128, 8), (512, 10)):
        # float16 is loaded as bfloat16 is: once is enough
        for dtype in ("bf16", "fp16", "fp32") if experts == 64 else ("bf16", "fp32"):
            for sigmoid in (False, True):
                for optional in (False, True):
                    constants, _, warps = _config(experts, 1, 1, 1, 1)
                    constants |= {"TOP_K": top_k, "SIGMOID": sigmoid, "NORMALIZE": True, "logits_e": 1}
                    absent = {} if optional else dict.fromkeys(["bias", "mask", "bounds", "scores_grad", "z_grad"])
                    signature = {"logits": f"*{dtype}", "grad": f"*{dtype}"} | outputs | sizes | inputs | grads
                    label = f"{experts} experts top {top_k} {dtype} {'sigmoid' if sigmoid else 'softmax'}"
                    for fn, name, suffix, own in (
                        (_route_kernel, "route", " bias mask packed", {"BLOCK_K": next_power_of_2(top_k)}),
                        (_route_backward_kernel, "route backward", " packed stats", {"weights_k": 1}),
                    ):
                        used = {n: v for n, v in (constants | own | absent).items() if n in fn.arg_names}
                        specs.append(
                            CompileSpec(f"{name} {label}{suffix * optional}", fn, signature, used, num_warps=warps)
                        )
        signature = {f"{n}{o}": "*i32" for n in ("counts", "valid_tokens", "valid") for o in ("", "_out")}
        signature |= {f"{n}{o}": "*fp32" for n in ("scores", "z") for o in ("", "_out")} | {"chunks": "i32"}
        constants = {"EXPERTS": experts, "BLOCK_C": SUM_CHUNKS, "BLOCK_E": SUM_EXPERTS}
        specs.append(CompileSpec(f"route sums {experts} experts", _sum_chunks_kernel, signature, constants))
    return specs
