"""Attention of packed documents, one after the other, so that nothing is computed between them.

A block-diagonal mask costs the square of the whole row.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_llm.compat.transformers import ATTENTION

MODEL_TYPES = ("ds_llm_decoder", *ATTENTION)  # whose attention is causal, without sinks, soft caps or biases on scores


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal attention within each document, in the form of transformers' attention functions.

    query [1, heads, T, D], key and value [1, key heads, T, D]; cu_seq_lens_q [documents + 1]: where documents begin,
    and T; None for a single one. Returns [1, T, heads, D].
    """
    if query.shape[0] != 1:
        raise ValueError(f"expected one row of documents, got {query.shape[0]} rows")
    bounds = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    parts = []
    for start, end in itertools.pairwise(bounds):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        window = None
        if sliding_window is not None and end - start > sliding_window:
            distance = torch.arange(end - start, device=q.device)[:, None] - torch.arange(end - start, device=q.device)
            window = (distance >= 0) & (distance < sliding_window)
        part = F.scaled_dot_product_attention(
            q, k, v, window, dropout, is_causal=window is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1), None
