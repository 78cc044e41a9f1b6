"""Statistics of a language model's output distribution, straight from hidden states: entropy, log-probability, top-1.

The logits ``hidden @ weight.T`` exist one chunk at a time in the input dtype; each is read once after the matrix
product, by an online pass over the vocabulary (Milakov & Gimelshein 2018, "Online normalizer calculation for
softmax") that carries the maximum, ``sum exp``, ``sum x exp``, the label's logit and the arg max.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .linear_cross_entropy import linear_cross_entropy

__all__ = ["TokenStats", "linear_cross_entropy", "linear_token_stats"]

IGNORE = -100
TILE_TOKENS, TILE_VOCAB = 512, 1024  # a float32 tile of logits and its exponentials stay in a 2-4 MiB L2 cache
MASKED = -1e30  # stands for -inf where inf - inf would make NaN


class TokenStats(NamedTuple):
    """Per-token statistics in nats, float32 (float64 for float64 input); without labels `logprob` and `hit` are None."""

    entropy: Tensor  # [T], -sum_v p_v log p_v
    logprob: Tensor | None  # [T], log p[label]; 0 where the label is ignored
    logsumexp: Tensor  # [T], of the logits after softcap and temperature
    hit: Tensor | None  # [T] bool: the label is the arg max (ties go to the lower index); False where ignored


def _tile_sums(x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max m, sum exp(x - m) and sum (x - m) exp(x - m) of the rows of `x` [T, V], which is overwritten."""
    m = x.amax(1).clamp_(min=MASKED)
    x.sub_(m[:, None])
    e = torch.exp(x, out=scratch)
    s = e.sum(1)
    t = e.mul_(x).sum(1)
    if not bool(torch.isfinite(t).all()):  # 0 * -inf: some logits are masked
        t = torch.exp(x.clamp_(min=-1e4), out=scratch).mul_(x).sum(1)
    return m, s, t


def token_stats_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tiles of [rows, TILE_VOCAB] logits, summed in float32; each tile's sums are merged at the end of its rows."""
    T, V = hidden.shape[0], weight.shape[0]
    acc = torch.promote_types(hidden.dtype, torch.float32)
    entropy, lse, logprob = (torch.zeros(T, dtype=acc, device=hidden.device) for _ in range(3))
    hit = torch.zeros(T, dtype=torch.bool, device=hidden.device)
    tile = torch.empty(min(rows, T), TILE_VOCAB, dtype=hidden.dtype, device=hidden.device)
    scratch = torch.empty_like(tile, dtype=acc)
    for i in range(0, T, rows):
        h = hidden[i : i + rows]
        lab = None if labels is None else labels[i : i + rows]
        sums = []
        label_logit, first, label_tile = (torch.zeros(len(h), dtype=d, device=h.device) for d in (acc, bool, int))
        for j in range(0, V, TILE_VOCAB):
            w = weight[j : j + TILE_VOCAB]
            n = w.shape[0]
            flat = tile.view(-1)[: len(h) * n].view(len(h), n)
            x = torch.mm(h, w.t(), out=flat).to(acc)
            if bias is not None:
                x += bias[j : j + n]
            if softcap is not None:
                x.div_(softcap).tanh_().mul_(softcap)
            if temperature != 1.0:
                x.div_(temperature)
            if lab is not None:
                here = ((lab >= j) & (lab < j + n)).nonzero().squeeze(1)
                if here.numel():
                    column = lab[here] - j
                    picked = x[here]
                    label_logit[here] = picked.gather(1, column[:, None]).squeeze(1)
                    first[here] = picked.argmax(1) == column
                    label_tile[here] = j // TILE_VOCAB
            sums.append(_tile_sums(x, scratch.view(-1)[: len(h) * n].view(len(h), n)))
        m, s, t = (torch.stack(part, 1) for part in zip(*sums, strict=True))
        top, best = m.max(1)
        shift = m - top[:, None]
        scale = shift.exp()
        t = ((t + s * shift) * scale).sum(1)
        s = (s * scale).sum(1)
        out = slice(i, i + len(h))
        lse[out] = top + s.log()
        entropy[out] = s.log() - t / s
        if lab is not None:
            valid = lab != IGNORE
            logprob[out] = torch.where(valid, label_logit - lse[out], 0)
            hit[out] = first & (label_tile == best) & valid
    return entropy, logprob, lse, hit


def _check(hidden: Tensor, weight: Tensor, labels: Tensor | None, bias: Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [T, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}")
    if labels is not None and labels.shape != hidden.shape[:1]:
        raise ValueError(f"expected labels [{hidden.shape[0]}], got {list(labels.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias [{weight.shape[0]}], got {list(bias.shape)}")


@torch.no_grad()
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> TokenStats:
    """Entropy, label log-probability, log-sum-exp, top-1 hit of softmax(softcap(hidden @ weight.T + bias) / temperature).

    hidden [T, H] and weight [V, H] of one floating dtype; labels [T] integers in [0, V), -100 to ignore: hidden[i] is
    scored against labels[i] (no shift). softcap c replaces a logit x by c * tanh(x / c). chunk: tokens whose logits
    exist at a time (chosen by size otherwise). No gradient. Raises ValueError when shapes do not match.
    """
    _check(hidden, weight, labels, bias)
    if labels is not None:
        labels = labels.long()
    entropy, logprob, lse, hit = token_stats_reference(
        hidden, weight, labels, bias, softcap, temperature, chunk or TILE_TOKENS
    )
    return TokenStats(entropy, None if labels is None else logprob, lse, None if labels is None else hit)
