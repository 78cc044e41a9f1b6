"""Small random mixture-of-experts models and Select-MoE models made of them, in folders."""

from __future__ import annotations

from pathlib import Path

import torch
from jobs import VOCAB
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ds_llm.convert.select_moe import select_moe
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM

KINDS = ("decoder", "olmoe", "qwen3_moe")


def original(kind: str, vocab_size: int, **options) -> torch.nn.Module:
    """A model of three layers, without dropout; of qwen3_moe the second has no experts."""
    size = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    size |= {"num_key_value_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64}
    size |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options}
    experts = {"num_experts": 5, "num_experts_per_tok": 2}
    if kind == "decoder":
        own = {"use_moe": True, "n_routed_experts": 5, "n_shared_experts": 1, "moe_intermediate_size": 16}
        return DecoderForCausalLM(DecoderConfig(**{**size, **own}))
    if kind == "olmoe":
        return OlmoeForCausalLM(OlmoeConfig(**{**experts, **size}))
    own = {"head_dim": 8, "moe_intermediate_size": 16, "mlp_only_layers": [1]}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**experts, **own, **size}))


def save(kind: str, folder: Path, tokenizer: Path, vocab_size: int, spread: float = 0.2, **options) -> Path:
    """The folder of a model, with a tokenizer; weights far from their first values, so that layers matter."""
    model = original(kind, vocab_size, **options)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=spread)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def convert(source: Path, out: Path, **options) -> Path:
    return select_moe(source, out, **{"init_std": 0.3, **options}).folder


def pair(folder: Path, corpus: Path, chats: Path) -> Path:
    """Select-MoE models: `decoder` with the tokenizer of the corpus, and `chat`, made of the chat model qwen3_moe."""
    convert(save("decoder", folder / "original", corpus / "tokenizer", VOCAB), folder / "decoder")
    convert(chats / "qwen3_moe", folder / "chat")
    return folder
