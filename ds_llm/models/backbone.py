"""The part of a causal language model below its output head."""

from __future__ import annotations

from torch import nn

from ds_llm.compat.peft import is_adapter, learns_prompts, without_wrapper
from ds_llm.errors import UserError


def backbone(model: nn.Module) -> nn.Module:
    """The module of a causal language model that returns `last_hidden_state`; adapters of peft stay active in it."""
    if is_adapter(model) and learns_prompts(model):
        raise UserError("prompt-learning adapters (prompt, prefix, p-tuning) are not supported: use LoRA")
    model = without_wrapper(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model or isinstance(decoder, nn.Linear):
        decoder = model.base_model
    if decoder is model:
        decoder = getattr(model, "model", None)
    if decoder is None:
        raise UserError(f"{type(model).__name__} has no backbone apart from its output head")
    return decoder
