"""Weights that are drawn on request are those that a model draws while it is built, in every architecture."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, configuration
from torch import nn
from transformers import AutoModelForCausalLM

from ds_llm.models.cut import small_configs
from ds_llm.models.decoder import DecoderConfig
from ds_llm.models.deferred import Deferred, settle, whole
from ds_llm.models.first_weights import build_deferred

LEAST = 2048  # bytes: most matrices of tiny models
# with initial weights of their own kind, or modules that draw for others'
KINDS = [
    "gpt2",
    "llama",
    "qwen3_next",
    "mamba2",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "jamba",
    "bloom",
    "recurrent_gemma",
]
assert set(KINDS) <= set(ARCHITECTURES)


def builder(kind: str):
    if kind == "decoder":
        small = DecoderConfig(
            vocab_size=70, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, use_moe=True, n_routed_experts=4
        )
    else:
        small = next(small_configs(configuration(kind)))
    return lambda: AutoModelForCausalLM.from_config(copy.deepcopy(small), dtype=torch.float32)


@pytest.mark.parametrize("kind", [*KINDS, "decoder"])
def test_models_start_with_the_same_weights(kind):
    build = builder(kind)
    torch.manual_seed(5)
    expected, after = build(), torch.rand(1)
    torch.manual_seed(5)
    found = build_deferred(build, LEAST)
    assert torch.equal(torch.rand(1), after)
    lazy = [p for p in found.parameters() if isinstance(p, Deferred)]
    assert sum(p.numel() for p in lazy) > 0.9 * sum(p.numel() for p in found.parameters())
    first, *_, last = lazy
    before = [whole(last).clone(), whole(first).clone()]  # in any order, as often as asked
    settle(found)
    state = found.state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name
    assert all(any(torch.equal(b, p) for p in found.parameters()) for b in before)
    assert [n for n, _ in found.named_parameters()] == [n for n, _ in expected.named_parameters()]


class Own(nn.Module):
    """A weight that its constructor draws, and reads."""

    def __init__(self, reads: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(64, 64).normal_())
        self.norm = self.weight.detach().norm() if reads else None


@pytest.mark.parametrize("reads", [False, True])
def test_models_whose_constructors_draw_for_good_are_built_at_once(reads):
    torch.manual_seed(5)
    expected = Own(reads)
    torch.manual_seed(5)
    found = build_deferred(lambda: Own(reads), LEAST)
    assert torch.equal(found.weight, expected.weight) and found.norm == expected.norm
