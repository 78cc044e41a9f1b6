"""The architecture of a run's model: that of a trained one, one named for training from scratch, or our decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ds_llm.compat.transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from ds_llm.config.run import Config
from ds_llm.errors import ConfigError, UserError, first_line
from ds_llm.models.decoder import DecoderConfig
from ds_llm.pretrained.loading import attention_kernel, load_model_config, supported_attention

SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")


def architecture(config: Config, tokenizer=None, vocab_size: int | None = None) -> PreTrainedConfig:
    """The transformers configuration of the model that a run trains.

    From scratch its vocabulary is `model.vocab_size`, else vocab_size, else the tokenizer's, and its special tokens are
    the tokenizer's. Raises `ConfigError` or `UserError` where there is none.
    """
    model = config.model
    if model.path is not None:
        return load_model_config(model.path)
    size = model.vocab_size or vocab_size or (len(tokenizer) if tokenizer is not None else None)
    special = {name: getattr(tokenizer, name) for name in SPECIAL} if tokenizer is not None else {}
    if model.config is None:
        return DecoderConfig.from_model_config(model, size or 1, **special)
    found = _named(model.config)
    for part in (found, found.get_text_config()):
        for name, value in special.items():
            setattr(part, name, value)
    if size is not None:
        found.get_text_config().vocab_size = size
    return found


def build_model(config: Config, found: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of an architecture with the first weights of its class, drawn from torch's generator, with the attention
    kernel of the run."""
    kernel = attention_kernel(config.model.attention, config.train.dtype)
    kernel = supported_attention(found, config.model.attention, kernel)
    return AutoModelForCausalLM.from_config(found, attn_implementation=kernel, dtype=dtype)


def _named(name: str) -> PreTrainedConfig:
    """The configuration in a folder, in a JSON file of any name, or of a model on the hub."""
    if not Path(name).expanduser().is_file():
        return load_model_config(name)
    try:
        found = AutoConfig.from_pretrained(str(Path(name).expanduser()), trust_remote_code=False)
    except Exception as error:  # from JSON errors to strict-configuration errors: all are about this file
        raise UserError(f"model.config: {name}: {first_line(error)}") from None
    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"model.config: {name}: a '{found.model_type}' model is not a causal language model")
    return found
