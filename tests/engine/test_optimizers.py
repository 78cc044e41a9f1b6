"""Which weights Muon trains, the groups' learning rates, and what is refused before a model is loaded."""

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_llm.config import deepspeed as deepspeed_config
from ds_llm.config.run import load
from ds_llm.engine import optimizers
from ds_llm.errors import ConfigError, UserError
from ds_llm.models.parameters import hidden_matrices

TINY = {
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 8},
    "mamba": {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 11},
    "qwen3_moe": {
        **{"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 11, "num_attention_heads": 2, "head_dim": 4},
        **{"num_experts": 4, "moe_intermediate_size": 4, "num_key_value_heads": 1, "tie_word_embeddings": True},
    },
}
EXPECTED = {
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},  # not wte, wpe and the tied head
    "mamba": {"mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"},  # not A_log and the convolution
    "qwen3_moe": {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),  # not the router
    },
}


@pytest.mark.parametrize("family", TINY)
def test_muon_trains_the_matrices_of_hidden_layers(family):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY[family]))
    chosen = {id(p) for p in hidden_matrices(model)}
    names = {name.split("0.", 1)[1].removesuffix(".weight") for name, p in model.named_parameters() if id(p) in chosen}
    assert names == EXPECTED[family]


def test_frozen_weights_are_not_among_them():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **TINY["gpt2"]))
    model.transformer.h[0].attn.requires_grad_(False)
    assert len(hidden_matrices(model)) == 2


def made(*keys: str) -> torch.optim.Optimizer:
    """The optimizer of two weights, a matrix of a linear layer and a vector, in two groups."""
    config = load(None, ["optim.lr=1e-3", *keys])
    deepspeed_config.adopt(config, 1)
    layer = torch.nn.Linear(3, 2)
    groups = [{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias], "weight_decay": 0.0}]
    return optimizers.maker(layer, deepspeed_config.build(config, 1))(groups)


def test_each_half_of_muon_has_its_own_options():
    keys = [
        "optim.name=muon",
        "optim.grad_clip=0",
        "optim.muon_lr=0.03",
        "optim.momentum=0.9",
        "optim.betas=[0.8, 0.9]",
    ]
    muon, adam = made(*keys).param_groups
    assert (muon["use_muon"], muon["lr"], muon["momentum"], muon["weight_decay"]) == (True, 0.03, 0.9, 0.1)
    assert (adam["use_muon"], adam["lr"], adam["betas"], adam["weight_decay"]) == (False, 1e-3, [0.8, 0.9], 0.0)


def test_a_deepspeed_json_gives_what_its_own_names_say():
    json = "deepspeed={optimizer: {type: Muon, params: {lr: auto, adam_lr: 2e-3}}}"
    muon, adam = made(json, "optim.grad_clip=0").param_groups
    assert (muon["lr"], adam["lr"]) == (1e-3, 2e-3)
    with pytest.raises(UserError, match=r"optimizer\.params\.beta3: Muon has no such parameter"):
        made("deepspeed={optimizer: {type: Muon, params: {beta3: 1}}}", "optim.grad_clip=0")


def test_muon_is_not_clipped():
    with pytest.raises(ConfigError, match=r"^optim\.grad_clip: 1\.0: .* set optim\.grad_clip=0$"):
        load(None, ["optim.name=muon"])
    with pytest.raises(ConfigError, match=r"^optim\.grad_clip: 1\.0"):
        deepspeed_config.adopt(load(None, ["deepspeed={optimizer: {type: Muon}}"]), 1)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_missing_package_is_named():
    with pytest.raises(UserError, match=r"^optim\.name=adamw8bit needs a package .* pip install bitsandbytes$"):
        optimizers.check(load(None, ["optim.name=adamw8bit"]))
