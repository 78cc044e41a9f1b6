"""Adapters: where they are put, what they compute, what alone is trained and saved, what is refused."""

import json
import math

import pytest
import torch
from chats import EXPERTS, adapted, randomise
from safetensors.torch import load_file

from ds_llm.config import run as config
from ds_llm.errors import ConfigError, UserError
from ds_llm.models.head import lm_loss
from ds_llm.pretrained import lora as adapters
from ds_llm.pretrained.fingerprint import identity
from ds_llm.pretrained.loading import load_model, load_tokenizer


@pytest.mark.parametrize(
    "name, options",
    [
        ("llama", ()),
        ("llama", ("lora.dora=true", "lora.init=gaussian")),
        ("decoder", ("lora.dora=true", "lora.targets=[q_proj,o_proj]")),
        ("decoder", (EXPERTS,)),
        ("qwen3_moe", ()),
        ("qwen3_moe", (EXPERTS,)),
    ],
)
def test_adapters_start_at_the_base_and_alone_learn(chats, name, options):
    model = adapted(chats, name, *options)
    base = load_model(chats / name, "fp32")
    ids = torch.randint(3, 200, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    randomise(model)
    lm_loss(model, ids, ids.roll(-1, 1)).loss_sum.backward()
    learned = {n for n, p in model.named_parameters() if p.grad is not None}
    assert learned == {n for n, p in model.named_parameters() if p.requires_grad}
    assert learned and all("lora_" in n for n in learned)
    if options == (EXPERTS,):
        assert sum("experts" in n and "lora_B" in n for n in learned) == 4


@pytest.mark.parametrize("rslora", [False, True])
def test_saved_adapter_is_the_low_rank_sum(chats, tmp_path, rslora):
    model = adapted(chats, "llama", "lora.alpha=6", f"lora.rslora={rslora}", "lora.targets=[mlp.up_proj]")
    weights = randomise(model)
    adapters.save_adapter(model, weights, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 4 and not (tmp_path / "adapter" / "README.md").exists()
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(chats / "llama")
    merged, base = load_model(tmp_path / "adapter", "fp32"), load_model(chats / "llama", "fp32")
    scale = 6 / (math.sqrt(4) if rslora else 4)
    for i in range(2):
        a, b = (stored[f"base_model.model.model.layers.{i}.mlp.up_proj.lora_{f}.weight"].double() for f in "AB")
        expected = base.model.layers[i].mlp.up_proj.weight.double() + scale * b @ a
        torch.testing.assert_close(merged.model.layers[i].mlp.up_proj.weight.double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(merged.model.layers[i].mlp.down_proj.weight, base.model.layers[i].mlp.down_proj.weight)


@pytest.mark.parametrize("harm", ["empty", "missing"])
def test_adapters_with_holes_are_not_saved(chats, tmp_path, harm):
    model = adapted(chats, "llama")
    weights = randomise(model)
    name = next(iter(weights))
    if harm == "empty":
        weights[name] = torch.empty(0)
    else:
        del weights[name]
    with pytest.raises(UserError, match="not gathered whole"):
        adapters.save_adapter(model, weights, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "name, overrides, text",
    [
        ("llama", ["lora.targets=[q_prj]"], "did you mean 'q_proj'?"),
        ("llama", ["lora.targets=[experts.down_proj]"], "no linear layer of the model is called"),
        ("decoder", ["lora.targets=[experts.down_projj]"], "did you mean 'experts.down_proj'?"),
        ("decoder", [EXPERTS, "lora.dropout=0.1"], "without DoRA and dropout"),
        ("decoder", [EXPERTS, "lora.dora=true"], "without DoRA and dropout"),
        ("decoder", ["lora.targets=[lm_head]"], "shares its weight with the token embedding"),
    ],
)
def test_impossible_targets_are_refused_before_loading(chats, name, overrides, text):
    with pytest.raises(ConfigError) as raised:
        adapted(chats, name, *overrides)
    assert text in str(raised.value) and "\n" not in str(raised.value)


def test_adapters_need_a_model_to_start_from():
    with pytest.raises(ConfigError, match="name it"):
        adapters.check(config.load(None, ["lora.enabled=true"]))


def test_a_changed_base_model_is_recognised(chats, tmp_path):
    import shutil

    folder = tmp_path / "base"
    shutil.copytree(chats / "llama", folder)
    assert identity(folder) == identity(chats / "llama")
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert identity(folder) != identity(chats / "llama")


def test_quantised_base_computes_and_learns_like_its_rounded_weights(chats, tmp_path):
    functional = pytest.importorskip("bitsandbytes").functional
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(chats / "llama")
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    packed, plain = (adapted(tmp_path, "wide", f"lora.quantize={q}") for q in ("nf4", "none"))
    weights = dict(packed.named_parameters())
    quantised = [n for n, p in weights.items() if p.dtype == torch.uint8]
    assert len(quantised) == 14 and all(n.endswith("base_layer.weight") for n in quantised)
    randomise(packed)
    ids = torch.randint(3, 200, (2, 20))
    with torch.no_grad():
        packed.eval()(input_ids=ids)  # evaluations come between training steps
        for name, p in plain.named_parameters():
            whole = name not in quantised
            p.copy_(weights[name] if whole else functional.dequantize_4bit(weights[name], weights[name].quant_state))
    grads = []
    for model in (packed, plain):
        lm_loss(model.train(), ids, ids.roll(-1, 1)).loss_sum.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and all("lora_" in n for n in grads[0])
    for name, value in grads[1].items():
        torch.testing.assert_close(grads[0][name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))


def test_quantised_weights_are_not_trained(chats, monkeypatch):
    monkeypatch.setattr("ds_llm.pretrained.loading.need", lambda *packages, what: None)
    with pytest.raises(ConfigError, match=r"cannot be trained; set lora\.enabled=true"):
        adapted(chats, "llama", "lora.quantize=nf4", "lora.enabled=false")
