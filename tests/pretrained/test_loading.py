"""Loading models from everything a user may name, and what is said when it cannot be done."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ds_llm.errors import UserError
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM
from ds_llm.models.deferred import Deferred, settle
from ds_llm.pretrained import partial as trained_part
from ds_llm.pretrained.loading import (
    attention_kernel,
    ensure_padding,
    load_model,
    load_model_config,
    load_tokenizer,
    locate,
    match_tokenizer,
)

VOCAB = 60


def tokenizer(size: int = VOCAB, **special) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def decoder() -> DecoderForCausalLM:
    config = DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_moe=True,
        n_routed_experts=4,
        tie_word_embeddings=False,
    )
    return DecoderForCausalLM(config).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None] * 2 % VOCAB).logits


@pytest.fixture
def run(tmp_path):
    """The output folder of a run with a final model and two checkpoints, and the logits of its model."""
    final, first, second = decoder(), decoder(), decoder()
    for step, model in ((1, first), (2, second)):
        model.save_pretrained(tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "model")
    final.save_pretrained(tmp_path / "run" / "model")
    tokenizer(eos_token="w1", pad_token="w2").save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run", logits(final), logits(second)


def test_runs_checkpoints_and_folders(run, monkeypatch):
    folder, final, second = run
    for path in (folder, str(folder), folder / "model", f"{folder}/"):
        assert torch.equal(logits(load_model(path)), final)
    assert torch.equal(logits(load_model(folder / "checkpoints" / "step-00000002")), second)
    monkeypatch.chdir(folder.parent)
    assert torch.equal(logits(load_model("run")), final)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert torch.equal(logits(load_model("~/run")), final)
    assert load_model_config(folder).num_hidden_layers == 2
    assert load_tokenizer(folder).pad_token == "w2"
    model = load_model(folder)
    assert not model.training and all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())


def test_dtypes(run):
    folder = run[0]
    half = load_model(folder, dtype="bf16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(folder / "half")
    assert load_model(folder / "half").dtype == torch.bfloat16
    assert load_model(folder / "half", dtype="fp32").dtype == torch.float32
    with pytest.raises(UserError, match="dtype 'int8': must be auto, fp32, bf16, fp16"):
        load_model(folder, dtype="int8")


def test_attention_kernels(run, monkeypatch):
    assert load_model(run[0]).config._attn_implementation == "sdpa"
    assert load_model(run[0], attention="eager").config._attn_implementation == "eager"
    assert attention_kernel("auto", "bf16") == "sdpa"  # neither a GPU nor flash-attn in the test environment
    with pytest.raises(UserError, match="needs a GPU and the package flash-attn"):
        attention_kernel("flash_attention_2", "bf16")
    with pytest.raises(UserError, match=r"did you mean sdpa\?"):
        attention_kernel("sdap", "bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("ds_llm.pretrained.loading.is_flash_attn_2_available", lambda: True)
    assert attention_kernel("auto", "bf16") == attention_kernel("auto", "fp16") == "flash_attention_2"
    assert attention_kernel("auto", "fp32") == "sdpa"
    with pytest.raises(UserError, match="not fp32"):
        attention_kernel("flash_attention_2", "fp32")


@pytest.mark.parametrize("kind", ["lora", "modules_to_save"])
def test_adapter_is_merged_into_its_base(run, kind):
    from peft import LoraConfig, get_peft_model

    folder, final, _ = run
    extra = {"modules_to_save": ["lm_head"]} if kind == "modules_to_save" else {}
    settings = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False, **extra
    )
    adapted = get_peft_model(load_model(folder), settings)
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(2)
    adapted.eval().save_pretrained(folder / "adapter")
    merged = load_model(folder / "adapter")
    assert type(merged) is DecoderForCausalLM
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in decoder().named_parameters()]
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)
    assert (logits(merged) - final).abs().max() > 1e-3
    assert load_tokenizer(folder / "adapter").pad_token == "w2"
    assert load_model_config(folder / "adapter").model_type == "ds_llm_decoder"


ADAPTERS = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "rslora with dora": {"target_modules": ["q_proj", "o_proj"], "use_rslora": True, "use_dora": True},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "experts": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "whole head": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_merged_when_the_weights_are_read(run, kind, dtype):
    from peft import LoraConfig, get_peft_model

    folder = run[0]
    base = load_model(folder)
    settings = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **ADAPTERS[kind])
    adapted = get_peft_model(base, settings)
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(folder / "adapter")
    expected = load_model(folder / "adapter", dtype)
    found = load_model(folder / "adapter", dtype, deferred=True)
    assert any(isinstance(p, Deferred) for p in found.parameters()) == ("dora" not in kind)
    assert [n for n, _ in found.named_parameters()] == [n for n, _ in expected.named_parameters()]
    settle(found)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_trained_part_of_a_model_lies_on_a_base_that_is_not_read_yet(run, dtype):
    folder = run[0]
    model = load_model(folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
        parameter.data.mul_(2 if "layers.1" in name else 3)
    trained_part.mark(model, str(folder))
    trained_part.save(model, dict(model.named_parameters()), folder / "part")
    found, expected = (load_model(folder / "part", dtype, deferred=lazy) for lazy in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(settle(found).parameters(), expected.parameters(), strict=True))
    second = load_model(folder, dtype)
    for (name, value), before in zip(expected.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(value, before * 2 if "layers.1" in name else before)


def test_adapters_that_cannot_be_merged(run):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    folder = run[0]
    prompt = get_peft_model(load_model(folder), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompt.peft_config["default"].base_model_name_or_path = str(folder)
    prompt.save_pretrained(folder / "prompt")
    with pytest.raises(UserError, match="no weights to merge"):
        load_model(folder / "prompt")
    lora = get_peft_model(load_model(folder), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(folder / "lora")
    file = folder / "lora" / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="names no base model"):
        load_model(folder / "lora")
    file.write_text(json.dumps(values | {"base_model_name_or_path": str(folder / "gone")}))
    with pytest.raises(UserError, match="gone: no such file or folder"):
        load_model(folder / "lora")


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """A Llama in GGUF, its linear layers in 8 bits."""
    import gguf

    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{i}" for i in range(c.vocab_size)])
    writer.add_token_merges([])
    writer.add_eos_token_id(1)
    names = {"embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names |= {f"layers.{i}.{a}": f"blk.{i}.{b}" for i in range(c.num_hidden_layers) for a, b in parts.items()}
    for name, value in model.state_dict().items():
        stem = name.removesuffix(".weight").removeprefix("model.") if name != "model.norm.weight" else "model.norm"
        array = value.float()
        for kind, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
            if kind in name:  # llama.cpp stores the two halves of a head interleaved
                array = array.view(heads, 2, -1, c.hidden_size).transpose(1, 2).reshape(array.shape)
        if array.dim() == 1:
            writer.add_tensor(f"{names[stem]}.weight", array.numpy())
            continue
        packed = gguf.quantize(array.numpy(), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{names[stem]}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_loads_as_plain_weights(tmp_path):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    original = LlamaForCausalLM(config).eval()
    write_gguf(tmp_path / "tiny.gguf", original)
    with pytest.raises(UserError, match=r"name one of its GGUF files, for example .*tiny\.gguf"):
        load_model(tmp_path)
    model = load_model(tmp_path / "tiny.gguf", dtype="fp32")
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    difference = (logits(model) - logits(original)).abs().max()
    assert 0 < difference < 0.05 * logits(original).abs().max()  # 8 bits
    model.train()
    model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    model.eval().save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved")), logits(model))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(9))
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        load_model(tmp_path / "bad.gguf")


def test_paths_that_are_not_models(run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for a network
    folder = run[0]
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder / "checkpoints", tmp_path / "unfinished" / "checkpoints")
    for path, message in (
        (tmp_path / "rum", f"rum: no such file or folder; did you mean {folder}?"),
        (tmp_path / "a" / "b", "nor is there a folder"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "empty", "no config.json here"),
        (folder / "checkpoints", "did you mean"),
        (tmp_path / "unfinished", "no final model yet; name a checkpoint"),
        (tmp_path / "none.gguf", "no such file"),
        ("no-such-owner/no-such-model", "no-such-owner/no-such-model: no "),
        ("./model", "no such file or folder"),
    ):
        for load in (load_model, load_model_config, load_tokenizer):
            with pytest.raises(UserError) as error:
                load(path)
            assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="step-00000002"):
        locate(tmp_path / "unfinished")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: cannot be read"),
        ("{}", "names no model_type"),
        ("[]", "names no model_type"),
        (
            '{"model_type": "lama"}',
            "'lama' is not known to this version of transformers; did you mean llama?",
        ),
        ('{"model_type": "t5"}', "a 't5' model is not a causal language model"),
        ('{"model_type": "ds_llm_decoder", "hidden_size": 30, "num_attention_heads": 4}', "30 is not a multiple of 4"),
        ('{"model_type": "ds_llm_decoder", "num_hidden_layers": "two"}', "num_hidden_layers"),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        load_model(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("deferred", [False, True])
def test_weights_that_do_not_fit_are_refused(run, capsys, deferred):
    load = partial(load_model, deferred=deferred)
    folder, final, _ = run
    file = folder / "model" / "model.safetensors"
    good = load_file(file)

    def save(values):
        save_file(values, file, metadata={"format": "pt"})

    save({name: value for name, value in good.items() if name != "model.layers.1.mlp.gate.weight"})
    with pytest.raises(UserError, match=r"lacks 1 of the model's tensors, first model\.layers\.1\.mlp\.gate\.weight"):
        load(folder)
    save(good | {"model.norm.weight": torch.ones(7)})
    with pytest.raises(UserError, match=r"another shape for 1 of the model's tensors, first model\.norm\.weight"):
        load(folder)
    save(good | {"model.extra": torch.ones(7)})
    assert torch.equal(logits(load(folder)), final)
    assert "1 tensors of the weight file belong to no part of the model, first model.extra" in capsys.readouterr().err
    save(good)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or incomplete"):
        load(folder)
    file.unlink()
    with pytest.raises(UserError, match="weights cannot be loaded"):
        load(folder)


@pytest.mark.parametrize("deferred", [False, True])
def test_files_of_a_model_in_parts_that_are_missing_or_misfit_are_refused(chats, tmp_path, deferred):
    whole, folder = load_model(chats / "qwen3_moe"), tmp_path / "model"
    whole.save_pretrained(folder, max_shard_size="40KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    expert = "model.layers.1.mlp.experts.2.up_proj.weight"
    place = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][expert]
    good = load_file(place)
    save_file(good | {expert: torch.ones(3, 5)}, place, metadata={"format": "pt"})
    with pytest.raises(UserError, match="model") as raised:
        load_model(folder, deferred=deferred)
    assert "\n" not in str(raised.value)
    save_file(good, place, metadata={"format": "pt"})
    found = load_model(folder, deferred=deferred)
    assert all(torch.equal(a, b) for a, b in zip(settle(found).parameters(), whole.parameters(), strict=True))
    files[1].unlink()
    with pytest.raises(UserError, match=r"model-00002-of-|weights cannot be loaded"):
        load_model(folder, deferred=deferred)


def test_padding_tokens(tmp_path, capsys):
    for special, expected in (
        ({"pad_token": "w3", "eos_token": "w1"}, "w3"),
        ({"eos_token": "w1", "unk_token": "w0"}, "w1"),
        ({"unk_token": "w0"}, "w0"),
    ):
        folder = tmp_path / expected
        tokenizer(**special).save_pretrained(folder)
        found = load_tokenizer(folder)
        assert found.pad_token == expected and len(found) == VOCAB
        said = capsys.readouterr().err
        assert ("no padding token" in said) == ("pad_token" not in special)
    with pytest.raises(UserError, match="no padding, end-of-text or unknown token"):
        ensure_padding(tokenizer())
    model = decoder()
    match_tokenizer(model, found)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0
    rows = model.get_input_embeddings().num_embeddings
    with pytest.raises(UserError, match="61 tokens, the model only 60"):
        match_tokenizer(model, tokenizer(rows + 1, pad_token="w1"))
    assert model.get_input_embeddings().num_embeddings == rows
    assert np.isfinite(logits(model).numpy()).all()
