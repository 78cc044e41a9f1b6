"""Attention of packed documents, one after the other, so that nothing is computed between them.

A block-diagonal mask costs the square of the whole row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_llm.compat.torch import variable_length_attention

HALF = (torch.bfloat16, torch.float16)


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Sequence[int],
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal attention within each document of one row.

    query [1, heads, T, D], key [1, key heads, T, D], value [1, key heads, T, Dv]; bounds: where documents begin, and T.
    scaling: of the scores, 1 / sqrt(D) where None; sliding_window: so many tokens, its own among them, a token sees;
    softcap c replaces a score x by c * tanh(x / c); s_aux [heads]: score of a sink that takes part in each softmax
    (gpt-oss). Returns [1, T, heads, Dv]. On a GPU in 16 bits this is torch's variable-length kernel; ValueError for
    what it does not have.
    """
    if query.device.type == "cuda":
        if softcap is not None or s_aux is not None or dropout or query.dtype not in HALF:
            raise ValueError("torch's variable-length attention has no soft caps, sinks, dropout or fp32")
        return _varlen(query, key, value, bounds, scaling, sliding_window), None
    one = _plain if softcap is None and s_aux is None else _scores
    parts = [
        one(*(x[:, :, start:end] for x in (query, key, value)), dropout, scaling, sliding_window, softcap, s_aux)
        for start, end in itertools.pairwise(bounds)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _window(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """Mask [S, S] of the keys that each query attends to, or None if plain causal attention gives the same."""
    if sliding_window is None or length <= sliding_window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < sliding_window)


def _plain(q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, sliding_window: int | None, *_):
    window = _window(q.shape[2], sliding_window, q.device)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, window, dropout, is_causal=window is None, scale=scaling, enable_gqa=gqa
    )


def _scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with all scores [heads, S, S] of one document in memory.

    It serves the soft cap and the sinks, which torch's `scaled_dot_product_attention` lacks.
    """
    heads, length = q.shape[1:3]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seen = _window(length, sliding_window, q.device)
    if seen is None:
        seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, heads, length, 1).to(scores.dtype)], -1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout) @ v


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], scaling: float | None, window: int | None):
    width = v.shape[-1]
    ends = torch.tensor(bounds, dtype=torch.int32, device=q.device)
    longest = max(end - start for start, end in itertools.pairwise(bounds))
    tokens = (x[0].transpose(0, 1).contiguous() for x in (q, k, F.pad(v, (0, q.shape[-1] - width))))
    return variable_length_attention(*tokens, ends, longest, scaling, window)[None, ..., :width]
