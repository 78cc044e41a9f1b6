"""The model a fine-tuning run starts from."""

from __future__ import annotations

import torch
from torch import nn

from ds_llm.config.run import Config
from ds_llm.errors import UserError
from ds_llm.models import accelerate
from ds_llm.models.head import attach_loss_head
from ds_llm.pretrained.added_tokens import add_rows
from ds_llm.pretrained.loading import load_model, load_tokenizer, match_tokenizer
from ds_llm.pretrained.lora import add_adapter, is_in_parts
from ds_llm.progress import console


def start_model(config: Config, tokenizer, dtype: str | None = None) -> nn.Module:
    """The model at `model.path`, ready for training: kernels, loss head, adapters, recomputation as configured.

    Parts that `model.freeze` names get no adapters. dtype: of the loaded weights; None: fp32, or with adapters
    `train.dtype`, because frozen weights need no fp32 copy. Weights in safetensors files are not read yet: see
    `ds_llm.models.deferred` and `ds_llm.engine.weights`.
    """
    lora = config.lora
    model = load_model(
        config.model.path,
        dtype=dtype or (config.train.dtype if lora.enabled else "fp32"),
        attention=config.model.attention,
        compute_dtype=config.train.dtype,
        quantize=lora.quantize if lora.enabled else "none",
        deferred=True,
    )
    if config.model.add_tokens:
        before = load_tokenizer(config.data.tokenizer or config.model.path).get_vocab()
        new = [token for token in config.model.add_tokens if token not in before]
        add_rows(model, tokenizer, tokenizer.convert_tokens_to_ids(new))
    match_tokenizer(model, tokenizer)
    if config.train.kernels:
        console.print(str(accelerate(model)))
    attach_loss_head(model)
    if config.train.activation_checkpointing:
        recompute_layers(model)
    if lora.enabled:
        torch.manual_seed(config.train.seed)
        model = add_adapter(model, lora, config.model.path, config.model.freeze, bool(config.model.add_tokens))
    else:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if is_in_parts(name, config.model.freeze):
                parameter.requires_grad_(False)
    return model


def recompute_layers(model: nn.Module) -> None:
    """Have a model compute its layers again in the backward pass, in place. `UserError` where transformers cannot."""
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"train.activation_checkpointing: transformers cannot compute the layers of a '{model.config.model_type}' "
            "model again; set it to false"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
