"""What the decoder takes from its peers, against Llama and Qwen3: positions, norms, windows, dense layers, balance."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from models.test_decoder import MOE, llama_of, make, tokens
from transformers import Qwen3Config, Qwen3ForCausalLM

from ds_llm.compat.hf_model import cache_argument
from ds_llm.models.decoder import DecoderConfig
from ds_llm.models.moe import balance

ROPE = {
    "linear": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        **{"factor": 8.0, "original_max_position_embeddings": 32},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
}


@pytest.mark.parametrize("kind", ROPE)
def test_scaled_positions_are_those_of_llama(kind):
    rope = {"rope_type": kind, "rope_theta": 5e3, **ROPE[kind]}
    model = make(seed=1, rope_parameters=rope, max_position_embeddings=128)
    plain = make(seed=1, rope_parameters={"rope_type": "default", "rope_theta": 5e3}, max_position_embeddings=128)
    ids = tokens(2, 90)
    with torch.no_grad():
        found, expected, other = model(ids).logits, llama_of(model)(ids).logits, plain(ids).logits
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    assert (found - other).abs().max() > 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_norms_of_heads_and_windows_are_those_of_qwen3(attention):
    window = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    model = make(seed=2, num_hidden_layers=3, num_key_value_heads=2, qk_norm=True, attention=attention, **window)
    c = model.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    config = Qwen3Config(
        **{name: getattr(c, name) for name in names}, rope_parameters=dict(c.rope_parameters), use_sliding_window=True
    )
    config.sliding_window, config.layer_types, config._attn_implementation = 5, c.layer_types, attention
    qwen = Qwen3ForCausalLM(config).eval()
    qwen.load_state_dict(model.state_dict(), strict=True)
    ids = tokens(2, 23)
    with torch.no_grad():
        found, expected = model(ids).logits, qwen(ids).logits
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
        steps, cache = [], None
        for i in range(ids.shape[1]):  # the cache of a windowed layer forgets
            out = model(ids[:, i : i + 1], use_cache=True, **({} if cache is None else cache_argument(cache)))
            steps.append(out.logits)
            cache = out.cache
    torch.testing.assert_close(torch.cat(steps, 1), found, atol=2e-3, rtol=1e-3)


def test_first_layers_stay_dense_and_a_bias_balances_the_others():
    model = make(seed=3, **MOE, num_hidden_layers=3, first_k_dense_replace=1, router_bias_speed=0.004)
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [False, True, True]
    ids = tokens(4, 64)

    def load() -> torch.Tensor:
        counts = model.model(ids).expert_counts.float()
        return counts / counts.sum(-1, keepdim=True)

    with torch.no_grad():
        before = load()
        assert before.shape == (2, MOE["n_routed_experts"])
        for _ in range(200):
            balance(model, load().tolist())
        after = load()
        assert (after - 1 / 6).abs().max() < 0.5 * (before - 1 / 6).abs().max()  # experts share the tokens more evenly
        biases = [layer.mlp.e_score_correction_bias.clone() for layer in model.model.layers[1:]]
        balance(model, after.tolist())
    for layer, bias, share in zip(model.model.layers[1:], biases, after, strict=True):
        moved = layer.mlp.e_score_correction_bias - bias
        torch.testing.assert_close(moved, 0.004 * (share.mean() - share).sign())
    assert "model.layers.1.mlp.e_score_correction_bias" in model.state_dict()


@pytest.mark.parametrize(
    "options, text",
    [
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_type 'yarn': a value is missing or wrong",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "is not one of default, linear",
        ),
        ({"layer_types": ["full_attention"], "num_hidden_layers": 2}, "layer_types has 1 entries for 2 layers"),
        ({"layer_types": ["sliding_attention"] * 2, "num_hidden_layers": 2}, "needs a sliding_window"),
        ({"use_moe": True, "first_k_dense_replace": 2, "num_hidden_layers": 2}, "leaves no layer for the experts"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, text):
    with pytest.raises(StrictDataclassError, match="architecture") as error:
        DecoderConfig(**options)
    assert text in str(error.value.__cause__)
