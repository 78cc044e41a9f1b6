"""Small random models in folders, as a user has them, for tests of scoring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM
from ds_llm.scoring.metrics import Sample

VOCAB = 61
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.4,  # distributions far from uniform
}
EXPERTS = SMALL | {"num_experts": 4, "num_experts_per_tok": 2}


def build(kind: str) -> torch.nn.Module:
    """A random causal language model: llama, wide, qwen2 (with a window), decoder (ours, with
    experts), olmoe or qwen3_moe."""
    if kind == "wide":  # ZeRO-3 leaves weights of less than 100,000 numbers whole
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | {"intermediate_size": 3200}))
    if kind == "qwen2":
        window = {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention"] * 2}
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL, **window))
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    if kind == "decoder":
        settings = {"use_moe": True, "n_routed_experts": 4, "scoring_func": "sigmoid"}
        return DecoderForCausalLM(DecoderConfig(**SMALL, **settings))
    if kind == "olmoe":
        return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**EXPERTS))
    settings = {"moe_intermediate_size": 48, "decoder_sparse_step": 1, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**EXPERTS, **settings))


def save(kind: str, folder: Path, tokenizer: Path) -> Path:
    """The model's folder, with a tokenizer."""
    model = build(kind)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def samples(random: np.random.Generator, lengths: list[int], scored: float = 0.6) -> list[Sample]:
    return [Sample(random.integers(4, VOCAB, n), random.random(n) < scored) for n in lengths]


@torch.no_grad()
def expected(model: torch.nn.Module, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Entropy and log-probability of each scored token in float64, one by one from the definition."""
    model = model.double().eval()
    entropy, logprob = [], []
    for i in range(1, len(sample)):
        if sample.scored[i]:
            logits = model(input_ids=torch.tensor(sample.input_ids[None, :i])).logits[0, -1]
            p = logits.softmax(-1)
            entropy.append(float(-(p * p.log()).sum()))
            logprob.append(float(p[sample.input_ids[i]].log()))
    return np.array(entropy), np.array(logprob)
