"""A tiny task in conversations (say the words backwards), and tiny untrained models with a chat template for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

EXPERTS = "lora.targets=[q_proj,experts.gate_up_proj,experts.down_proj]"
WORDS = ["red", "blue", "green", "cat", "dog", "sun"]


def conversations(count: int, seed: int):
    """Rows of one to three turns, so of very different lengths."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        messages = []
        for _ in range(random.integers(1, 4)):
            said = [WORDS[i] for i in random.integers(0, len(WORDS), random.integers(1, 6))]
            messages.append({"role": "user", "content": "reverse " + " ".join(said)})
            messages.append({"role": "assistant", "content": " ".join(said[::-1])})
        yield {"messages": messages}


def make_models(tokenizer) -> dict:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM

    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("pad", "bos", "eos")}
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "intermediate_size": 48, **ids}
    moe = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
    torch.manual_seed(0)
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**size)),
        "decoder": DecoderForCausalLM(DecoderConfig(**size, **moe, use_moe=True, n_routed_experts=4)),
        "qwen3_moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(**size, **moe, num_experts=4, head_dim=8)),
    }


def adapted(chats: Path, name: str, *overrides: str):
    """The model of that name with untrained adapters, made as a run makes it."""
    from ds_llm.config import run as config
    from ds_llm.models.deferred import settle
    from ds_llm.pretrained import lora as adapters
    from ds_llm.pretrained.loading import load_tokenizer
    from ds_llm.train.start_model import start_model

    settings = ["mode=sft", f"model.path={chats / name}", "train.dtype=fp32", "lora.enabled=true", "lora.r=4"]
    settings = config.load(None, [*settings, *overrides])
    adapters.check(settings)
    return settle(start_model(settings, load_tokenizer(chats / name)))


def randomise(model) -> dict:
    """Random values in the trained weights, as after training; returns them as gathered."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, mean=1.0 if "magnitude" in name else 0.0, std=0.05)
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    """Folder with `train.jsonl`, `val.jsonl` and the models `llama`, `decoder` (with experts) and `qwen3_moe`."""
    from ds_llm.data.tokenizer import train_tokenizer
    from ds_llm.pretrained.loading import load_tokenizer

    folder = tmp_path_factory.mktemp("chats")
    for name, count in (("train", 150), ("val", 20)):
        rows = conversations(count, count)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.jsonl").write_text(json.dumps({"text": "reverse " + " ".join(WORDS * 20)}) + "\n")
    train_tokenizer([folder / "text.jsonl"], folder / "tokenizer", vocab_size=300)
    tokenizer = load_tokenizer(folder / "tokenizer")
    for name, model in make_models(tokenizer).items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder
