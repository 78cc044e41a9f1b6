"""Small models of the architectures that are pruned, with weights that tell methods and rows apart."""

import torch
import transformers
from jobs import VOCAB

from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM

SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SMALL | {"intermediate_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 64}


def opt(**options):
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **SMALL, ffn_dim=40, max_position_embeddings=64, **({"word_embed_proj_dim": 32} | options)
        )
    )


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | options))


def experts_decoder():
    config = {"use_moe": True, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 24}
    return DecoderForCausalLM(DecoderConfig(**LLAMA, **config))


def qwen3_moe():
    config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**LLAMA, **config, mlp_only_layers=[0]))


MODELS = {
    "opt": opt,
    # as OPT-350m: normalised after each part, embeddings narrower than the blocks
    "opt_post_norm": lambda: opt(do_layer_norm_before=False, word_embed_proj_dim=16),
    "llama": llama,
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**LLAMA, sliding_window=8, max_window_layers=1, use_sliding_window=True)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA, head_dim=8)),
    "experts": experts_decoder,
    "qwen3_moe": qwen3_moe,
}


def uneven(model):
    """The model with weights and biases of very different sizes, so that methods and rows differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 * (torch.rand(parameter.shape[-1]) * 2))
    return model.eval()
