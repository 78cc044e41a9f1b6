"""Attention of packed documents on a CPU: one after the other, so that nothing is computed between them or on padding.

A block-diagonal mask costs the square of the whole row, and rows padded to one length cost the padding in every layer.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ds_llm.models.head import backbone
from ds_llm.models.hf_kernels import ATTENTION

NAME = "ds_llm_documents"
MODEL_TYPES = ("ds_llm_decoder", *ATTENTION)  # whose attention is causal, without sinks, soft caps or biases on scores


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
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
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for start, end in itertools.pairwise(bounds):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        window = None
        if sliding_window is not None and end - start > sliding_window:
            distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
            window = (distance >= 0) & (distance < sliding_window)
        part = F.scaled_dot_product_attention(
            q, k, v, window, is_causal=window is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        out[:, start:end] = part.transpose(1, 2)
    return out, None


def attend_by_document(model: nn.Module) -> bool:
    """Let a model on a CPU use `document_attention`; whether it does. Its inputs must then be one row of documents."""
    body = backbone(model)
    if body.config.model_type not in MODEL_TYPES or body.config._attn_implementation != "sdpa":
        return False
    body.set_attn_implementation(NAME)
    return True


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
