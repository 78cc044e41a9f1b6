"""Attention of packed documents on a CPU: one document after the other.

A block-diagonal mask costs the square of the whole row, and padded rows cost the padding in every layer.
"""

from __future__ import annotations

from torch import nn
from transformers import AttentionInterface

from ds_llm.compat.transformers import AttentionMaskInterface, chosen_attention
from ds_llm.models.attention import MODEL_TYPES, document_attention
from ds_llm.models.head import backbone

NAME = "ds_llm_documents"


def attend_by_document(model: nn.Module) -> bool:
    """Make a model on a CPU use `document_attention`, for inputs of one row of documents. Returns whether it does."""
    body = backbone(model)
    if body.config.model_type not in MODEL_TYPES or chosen_attention(body.config) != "sdpa":
        return False
    body.set_attn_implementation(NAME)
    return True


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
