"""Top-k routing of tokens to experts, its auxiliary losses, and the movement of tokens to experts and back."""

from typing import NamedTuple

import torch
from torch import Tensor


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
    """Chooses `top_k` experts for every token; see the module for the returned values."""
    tokens, experts = logits.shape
    x = logits if logits.dtype == torch.float64 else logits.float()
    valid = (x > -torch.inf).any(-1)
    if mask is not None:
        valid = valid & mask
    x = torch.where(valid[:, None], x, 0.0)
    lse = x.logsumexp(-1)
    if scoring == "softmax":
        scores = x.softmax(-1)
        shares = scores
    else:
        scores = x.sigmoid()
        shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    key = x if bias is None else torch.where(x > -torch.inf, scores + bias, -torch.inf)
    chosen = key.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(-1, chosen)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = torch.where(valid[:, None], weights, 0.0)
    if isinstance(sequences, int):
        group = torch.arange(tokens, device=x.device) // max(1, tokens // sequences)
        groups = sequences
    else:
        group = torch.searchsorted(sequences, torch.arange(tokens, device=x.device), right=True) - 1
        groups = len(sequences) - 1
    hits = torch.zeros(tokens, experts, dtype=torch.int32, device=x.device).scatter_(-1, chosen, 1)
    hits = hits * valid[:, None]
    stats = RoutingStats(
        torch.zeros(groups, experts, dtype=torch.int32, device=x.device).index_add_(0, group, hits.int()),
        x.new_zeros(groups, experts).index_add(0, group, shares * valid[:, None]),
        x.new_zeros(groups).index_add(0, group, lse.square() * valid),
        torch.zeros(groups, dtype=torch.int32, device=x.device).index_add_(0, group, valid.int()),
    )
    return weights, torch.where(valid[:, None], chosen, -1).int(), stats


def load_balancing_loss(stats: RoutingStats, *, per_sequence: bool = False) -> Tensor:
    """Auxiliary loss that is 1 for uniform routing, per batch or averaged over sequences; a scalar."""
    counts, scores, tokens = stats.counts, stats.scores, stats.tokens
    if not per_sequence:
        counts, scores, tokens = counts.sum(0, True), scores.sum(0, True), tokens.sum(0, True)
    share = counts * counts.shape[-1] / counts.sum(-1, keepdim=True).clamp_min(1)
    per_group = (share * scores).sum(-1) / tokens.clamp_min(1)
    return per_group.sum() / (tokens > 0).sum().clamp_min(1)


def z_loss(stats: RoutingStats) -> Tensor:
    """Mean over valid tokens of logsumexp(logits) ** 2 (Zoph et al., "ST-MoE", arXiv:2202.08906); a scalar."""
    return stats.z.sum() / stats.tokens.sum().clamp_min(1)


def permute(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copies each token of x [T, H] once per chosen expert, rows sorted by expert (stable).

    Returns rows [T * K, H]; offsets [E] int32, the end of each expert's rows (`offs` of `torch._grouped_mm`); inverse
    [T, K] int32, the row of each choice. A masked choice (index outside 0 .. E - 1) has inverse < 0; its row, `~inverse`,
    lies behind the last expert's and is zero.
    """
    slots = experts.numel()
    flat = experts.reshape(-1).long()
    masked = (flat < 0) | (flat >= num_experts)
    flat = torch.where(masked, num_experts, flat)
    order = flat.argsort(stable=True)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(slots, device=x.device))
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=x.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
    rows = x.index_select(0, order // max(1, experts.shape[1])) * (~masked)[order, None].to(x.dtype)
    offsets = counts.cumsum(0)[:num_experts].int()
    return rows, offsets, torch.where(masked, ~position, position).int().view_as(experts)


def unpermute(rows: Tensor, inverse: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over a token's choices of weight x row, in float32: [T, H] in the dtype of rows; masked choices add nothing."""
    picked = rows.index_select(0, inverse.clamp_min(0).reshape(-1)).view(*inverse.shape, rows.shape[-1]).float()
    picked = torch.where((inverse >= 0)[..., None], picked, 0.0)
    if weights is not None:
        picked = picked * weights[..., None]
    return picked.sum(1).to(rows.dtype)
