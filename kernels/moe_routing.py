"""Top-k routing of tokens to experts, its auxiliary losses, and the movement of tokens to experts and back.

`route` reads the E logits of a token once and writes K weights and K indices; its backward reads logits, indices and
weight gradients once and writes E logit gradients. What the auxiliary losses need is summed in the same pass, per
block of tokens and then over the blocks in a fixed order, so results do not vary between runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import moe_permute, moe_topk
from ._triton import uses_triton
from .moe_permute import permute, unpermute
from .moe_topk import EPSILON, route_backward_triton, route_triton

__all__ = ["RoutingStats", "load_balancing_loss", "permute", "route", "unpermute", "z_loss"]

CHUNK = 1 << 16  # logits that the reference sorts at a time, so that they stay in the processor's cache
LOWEST = -(0x7F800000 + 1)  # place of -inf in the order of float32 bit patterns


class RoutingStats(NamedTuple):
    """What the auxiliary losses need, per sequence g of G (G = 1 unless `route` was told of more).

    `counts` [G, E] int32: how often each expert was chosen. `scores` [G, E]: sum over tokens of each token's scores
    (of scores / their sum over experts for sigmoid scoring). `z` [G]: sum over tokens of logsumexp(logits) ** 2.
    `tokens` [G] int32: number of valid tokens. Gradients flow through `scores` and `z`.
    """

    counts: Tensor
    scores: Tensor
    z: Tensor
    tokens: Tensor


# --- torch reference


def _groups(tokens: int, bounds: Tensor | None, sequences: int, device: torch.device) -> Tensor:
    """The sequence of each token [T]."""
    token = torch.arange(tokens, device=device)
    if bounds is None:
        return token // max(1, tokens // sequences)
    return (torch.searchsorted(bounds, token, right=True) - 1).clamp_(0, sequences - 1)


def _sum_groups(x: Tensor, bounds: Tensor | None, sequences: int) -> Tensor:
    """Sum of x [T, ...] over the tokens of each sequence: [G, ...]."""
    if bounds is None:
        return x.unflatten(0, (sequences, -1)).sum(1) if x.shape[0] else x.new_zeros(sequences, *x.shape[1:])
    group = _groups(x.shape[0], bounds, sequences, x.device)
    return x.new_zeros(sequences, *x.shape[1:]).index_add_(0, group, x)


def _select(key: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Indices [T, K] of the largest of each row, in descending order, equal ones by index; and which are not -inf."""
    if key.device.type != "cpu" or key.dtype != torch.float32:
        values, order = key.sort(dim=-1, descending=True, stable=True)
        return order[:, :top_k], values[:, :top_k] != -torch.inf
    # value and index in one integer: NumPy sorts rows of integers several times as fast as torch finds the top k
    tokens, columns = key.shape
    step = min(tokens, max(1, CHUNK // columns))
    packed = torch.empty(step, columns, 2, dtype=torch.int32)
    best = torch.empty(tokens, top_k, dtype=torch.int64)
    for i in range(0, tokens, max(1, step)):
        bits = (key[i : i + step] + 0.0).view(torch.int32)  # -0 becomes 0, which it is equal to
        part = packed[: len(bits)]
        torch.bitwise_xor(bits, (bits >> 31) & 0x7FFFFFFF, out=part[..., 1])  # ordered as the values are
        part[..., 0] = torch.arange(columns - 1, -1, -1, dtype=torch.int32)
        rows = part.view(torch.int64)[..., 0]
        rows.numpy().sort(axis=-1)
        best[i : i + step] = rows[:, -top_k:]
    best = best.flip(-1)
    return columns - 1 - (best & 0xFFFFFFFF), (best >> 32) > LOWEST


def _softmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax [T, E] and logsumexp [T], in one pass where torch's two functions take two."""
    top = x.amax(-1, keepdim=True).clamp_min_(torch.finfo(x.dtype).min)
    power = (x - top).exp_()
    total = power.sum(-1, keepdim=True)
    return power.div_(total), (top + total.log())[:, 0]


def _route_reference(
    logits: Tensor,
    top_k: int,
    sigmoid: bool,
    normalize: bool,
    bias: Tensor | None,
    mask: Tensor | None,
    bounds: Tensor | None,
    sequences: int,
) -> tuple[Tensor, ...]:
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    softmax, lse = _softmax(x)
    scores = x.sigmoid() if sigmoid else softmax
    key = x if bias is None else torch.where(x == -torch.inf, x, scores + bias)
    if lse.isnan().any():  # NaN comes first, so that it shows in the weights
        key = key.masked_fill(key.isnan(), torch.inf)
    chosen, found = _select(key, top_k)
    weights = scores.gather(-1, chosen)
    shares = scores / (scores.sum(-1, keepdim=True) + EPSILON) if sigmoid else scores
    z = lse.square()
    # an expert whose logit is -inf is never chosen, and a token without any other takes no part
    if mask is not None:
        found = found & mask[:, None]
    every = bool(found.all())
    if not every:
        valid = found[:, 0]
        weights = weights.masked_fill(~found, 0.0)
        chosen = chosen.masked_fill(~found, -1)
        shares = shares.masked_fill(~valid[:, None], 0.0)
        z = z.masked_fill(~valid, 0.0)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + EPSILON)
    experts = logits.shape[1]
    flat = chosen
    if sequences > 1:
        flat = chosen + experts * _groups(len(x), bounds, sequences, x.device)[:, None]
    flat = flat.reshape(-1) if every else flat[found]
    counts = torch.bincount(flat, minlength=sequences * experts).view(sequences, experts).int()
    return (
        weights,
        chosen.int(),
        counts,
        _sum_groups(shares, bounds, sequences),
        _sum_groups(z, bounds, sequences),
        _sum_groups(found[:, 0].int(), bounds, sequences).int(),
    )


def _route_backward_reference(
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
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = experts.long()
    found = chosen >= 0
    every = bool(found.all())
    chosen = chosen if every else chosen.clamp_min(0)
    softmax, lse = (None, None) if sigmoid and z_grad is None else _softmax(x)
    scores = x.sigmoid() if sigmoid else softmax
    # score x its gradient through the weights
    flow = scores.gather(-1, chosen)
    if not every:
        flow = flow.masked_fill(~found, 0.0)
    if normalize:
        flow = flow / (flow.sum(-1, keepdim=True) + EPSILON)
        flow = flow * (weights_grad - (flow * weights_grad).sum(-1, keepdim=True))
    else:
        flow = flow * weights_grad
    group = _groups(len(x), bounds, sequences, x.device) if sequences > 1 else None
    shares_flow = None
    if scores_grad is not None:
        rows = scores_grad if group is None else scores_grad[group]
        shares = scores / (scores.sum(-1, keepdim=True) + EPSILON) if sigmoid else scores
        shares_flow = shares * rows
        if sigmoid:
            shares_flow = shares_flow - shares * shares_flow.sum(-1, keepdim=True)
    if sigmoid:
        grad = torch.zeros_like(x) if shares_flow is None else shares_flow
        grad = grad.scatter_add_(-1, chosen, flow) * (1 - scores)
    else:
        total = flow.sum(-1, keepdim=True)
        if shares_flow is not None:
            total = total + shares_flow.sum(-1, keepdim=True)
        grad = scores * -total if shares_flow is None else shares_flow.addcmul_(scores, total, value=-1)
        grad.scatter_add_(-1, chosen, flow)
    if z_grad is not None:
        rows = z_grad if group is None else z_grad[group]
        grad += softmax * (2 * rows * lse)[:, None]
    if not every:
        grad = grad.masked_fill(~found[:, :1], 0.0)
    return grad.to(logits.dtype)


# --- operators and their gradient


@torch.library.custom_op("ds_llm::route", mutates_args=())
def _route(
    logits: Tensor,
    top_k: int,
    sigmoid: bool,
    normalize: bool,
    bias: Tensor | None,
    mask: Tensor | None,
    bounds: Tensor | None,
    sequences: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = route_triton if uses_triton(logits) else _route_reference
    return run(logits, top_k, sigmoid, normalize, bias, mask, bounds, sequences)


@_route.register_fake
def _(logits, top_k, sigmoid, normalize, bias, mask, bounds, sequences):
    tokens, experts = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (
        logits.new_empty(tokens, top_k, dtype=wide),
        logits.new_empty(tokens, top_k, dtype=torch.int32),
        logits.new_empty(sequences, experts, dtype=torch.int32),
        logits.new_empty(sequences, experts, dtype=wide),
        logits.new_empty(sequences, dtype=wide),
        logits.new_empty(sequences, dtype=torch.int32),
    )


@torch.library.custom_op("ds_llm::route_backward", mutates_args=())
def _route_backward_op(
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
    run = route_backward_triton if uses_triton(logits) else _route_backward_reference
    return run(logits, experts, weights_grad, scores_grad, z_grad, sigmoid, normalize, bounds, sequences)


@_route_backward_op.register_fake
def _(logits, experts, weights_grad, scores_grad, z_grad, sigmoid, normalize, bounds, sequences):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    logits, _, ctx.sigmoid, ctx.normalize, _, _, bounds, ctx.sequences = inputs
    ctx.save_for_backward(logits, output[1], bounds)
    # where the auxiliary losses are not used, their part of the backward pass is left out
    ctx.set_materialize_grads(False)


def _backward(ctx, weights_grad, experts_grad, counts_grad, scores_grad, z_grad, tokens_grad):
    logits, experts, bounds = ctx.saved_tensors
    if weights_grad is None:
        weights_grad = torch.zeros(
            experts.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device
        )
    grad = _route_backward_op(
        logits, experts, weights_grad, scores_grad, z_grad, ctx.sigmoid, ctx.normalize, bounds, ctx.sequences
    )
    return grad, None, None, None, None, None, None, None


_route.register_autograd(_backward, setup_context=_save)


# --- public functions


def route(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    normalize: bool = True,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    sequences: int | Tensor = 1,
) -> tuple[Tensor, Tensor, RoutingStats]:
    """Chooses `top_k` experts for every token.

    logits [T, E] of any floating type and strides; computed in float32 (float64 for float64). Scores are the softmax
    over all experts or the sigmoid of each logit. The experts with the largest logits are chosen, or with the largest
    score + `bias` [E] where a bias is given (Wang et al., "Auxiliary-Loss-Free Load Balancing", arXiv:2408.15664): it
    takes part in the choice only, and has no gradient. Ties go to the lower index. Weights are the chosen scores,
    divided by their sum + 1e-20 if `normalize`.

    `mask` [T] bool: False for a token that takes no part. An expert whose logit is -inf is never chosen. `sequences`:
    over which tokens the statistics are summed, a number of equally long sequences that T is a multiple of, or the
    bounds [G + 1] of packed ones (0, ..., T).

    Returns weights [T, K] and experts [T, K] int32, best first, and the statistics of the auxiliary losses. A choice
    that was not made has weight 0 and expert -1. Differentiable in logits through weights, `stats.scores`, `stats.z`.
    Raises ValueError when the arguments do not fit together.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating-point [tokens, experts], not {logits.dtype} {tuple(logits.shape)}")
    tokens, experts = logits.shape
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be 1 to {experts}, the number of experts, not {top_k}")
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring must be softmax or sigmoid, not {scoring!r}")
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"bias must be [{experts}], not {list(bias.shape)}")
    if mask is not None and (mask.shape != (tokens,) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool [{tokens}], not {mask.dtype} {list(mask.shape)}")
    if bias is not None:
        bias = bias.detach().to(torch.promote_types(logits.dtype, torch.float32))
    bounds = None
    if isinstance(sequences, Tensor):
        if sequences.ndim != 1 or len(sequences) < 2 or sequences.is_floating_point():
            raise ValueError(f"sequences must be integer bounds [G + 1], not {list(sequences.shape)}")
        bounds, sequences = sequences.contiguous(), len(sequences) - 1
    elif sequences < 1 or tokens % sequences:
        raise ValueError(f"{tokens} tokens are not {sequences} sequences of one length")
    weights, chosen, *stats = _route(logits, top_k, scoring == "sigmoid", normalize, bias, mask, bounds, sequences)
    return weights, chosen, RoutingStats(*stats)


def load_balancing_loss(stats: RoutingStats, *, per_sequence: bool = False) -> Tensor:
    """E * sum over experts of (share of the choices) x (mean score), a scalar that is 1 for uniform routing.

    Over the batch (Fedus et al., "Switch Transformers", arXiv:2101.03961, eq. 4) or averaged over the sequences that
    have a valid token (DeepSeek-V2, arXiv:2405.04434). Differentiable through the mean scores.
    """
    counts, scores, tokens = stats.counts, stats.scores, stats.tokens
    if not per_sequence:
        counts, scores, tokens = counts.sum(0, True), scores.sum(0, True), tokens.sum(0, True)
    share = counts * counts.shape[-1] / counts.sum(-1, keepdim=True).clamp_min(1)
    per_group = (share * scores).sum(-1) / tokens.clamp_min(1)
    return per_group.sum() / (tokens > 0).sum().clamp_min(1)


def z_loss(stats: RoutingStats) -> Tensor:
    """Mean over valid tokens of logsumexp(logits) ** 2 (Zoph et al., "ST-MoE", arXiv:2202.08906); a scalar."""
    return stats.z.sum() / stats.tokens.sum().clamp_min(1)


def compile_specs() -> list:
    return moe_topk.compile_specs() + moe_permute.compile_specs()
