"""Conversion to Select-MoE: the original's files are taken over as they are, in little memory, or nothing is."""

import filecmp
import json
import runpy
import sys

import pytest
import torch
from gated import convert, save
from jobs import ROOT, VOCAB
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, OlmoeConfig

from ds_llm.convert import select_moe as convert_select_moe
from ds_llm.errors import UserError
from ds_llm.models.quality_gate import gates, open_gates
from ds_llm.pretrained.loading import load_model, load_tokenizer

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def olmoe(corpus, tmp_path_factory):
    return save("olmoe", tmp_path_factory.mktemp("olmoe") / "original", corpus / "tokenizer", VOCAB)


def test_commands_convert_and_compare(olmoe, tmp_path, monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        """Exit code and output of the command, run in this process."""
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "launch/convert.py"), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    out = tmp_path / "gated"
    code, said, errors = run("select-moe", "--model", olmoe, "--out", out, "--init-std", "0.3", "--seed", "5")
    assert code == 0 and not errors, errors
    assert "3 gates (96 weights) in 3 layers; 1 weight files" in said
    assert filecmp.cmp(olmoe / "model.safetensors", out / "model_base.safetensors", shallow=False)
    drawn = torch.cat([tensor.flatten() for tensor in load_file(out / "quality_gates.safetensors").values()])
    assert 0.2 < drawn.std() < 0.4
    assert load_tokenizer(out).get_vocab() == load_tokenizer(olmoe).get_vocab()
    code, said, errors = run("compare", "--model", out, "--original", olmoe)
    assert code == 0 and not errors, errors
    rows = [line.split() for line in said.splitlines()]
    original, gated = load_model(olmoe), load_model(out)
    ids = torch.randint(VOCAB, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (original(ids).logits - gated(ids).logits).abs().max()
    assert [row[2] for row in rows if row[0] == "layer"] == ["0"] * 3
    (logits,) = (row for row in rows if row[0] == "logits")
    assert logits[1] == "0" and float(logits[2]) == pytest.approx(float(difference), rel=1e-2)
    code, _, errors = run("select-moe", "--model", olmoe, "--out", out)
    assert code != 0 and errors.count("\n") == 1 and "holds something already" in errors


def test_the_seed_decides_the_gates(olmoe, tmp_path):
    found = [
        load_file(convert(olmoe, tmp_path / str(i), seed=seed) / "quality_gates.safetensors")
        for i, seed in enumerate([1, 1, 2])
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not any(torch.equal(found[0][name], found[2][name]) for name in found[0])


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_of_either_format_are_taken_over(olmoe, kind, tmp_path):
    source = tmp_path / "sharded"
    model = load_model(olmoe)
    model.save_pretrained(source, max_shard_size="8KB")
    load_tokenizer(olmoe).save_pretrained(source)
    names = json.loads((source / INDEX).read_text())["weight_map"]
    assert len(set(names.values())) > 3
    if kind == "bin":
        for shard in sorted(set(names.values())):
            torch.save(load_file(source / shard), source / shard.replace("safetensors", "bin"))
            (source / shard).unlink()
        moved = {tensor: file.replace("safetensors", "bin") for tensor, file in names.items()}
        (source / INDEX).unlink()
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": moved}))
    found = load_model(convert(source, tmp_path / "gated"))
    ids = torch.randint(VOCAB, (2, 9))
    with torch.no_grad(), open_gates(found):
        assert torch.equal(found(ids).logits, model(ids).logits)
    assert len(gates(found)) == 3


def peak_bytes() -> int:
    fields = dict(line.split(":") for line in open("/proc/self/status"))  # noqa: SIM115
    return int(fields["VmHWM"].split()[0]) * 1024


def test_memory_stays_below_two_shards(olmoe, tmp_path):
    source, shard = tmp_path / "large", 0
    source.mkdir()
    layers, experts, hidden, width = 4, 4, 512, 1024
    OlmoeConfig(num_hidden_layers=layers, num_experts=experts, hidden_size=hidden, intermediate_size=width,
                architectures=["OlmoeForCausalLM"]).save_pretrained(source)  # fmt: skip
    weight_map = {}
    for layer in range(layers):
        tensors = {
            f"model.layers.{layer}.mlp.experts.{e}.{name}.weight": torch.rand(shape)
            for e in range(experts)
            for name, shape in (
                ("gate_proj", (width, hidden)),
                ("up_proj", (width, hidden)),
                ("down_proj", (hidden, width)),
            )
        }
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        save_file(tensors, source / file)
        weight_map |= dict.fromkeys(tensors, file)
        shard = sum(t.nbytes for t in tensors.values())
    del tensors
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    convert(olmoe, tmp_path / "warm")  # what is imported and compiled on the way stays
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = peak_bytes()
    found = convert_select_moe.select_moe(source, tmp_path / "gated")
    assert found.bytes > layers * shard and found.files == layers and found.gates == layers
    assert peak_bytes() - before < 2 * shard
    for file in source.glob("*.safetensors"):
        assert filecmp.cmp(file, found.folder / file.name, shallow=False)


def test_what_cannot_be_converted_is_said_and_leaves_nothing(olmoe, corpus, tmp_path):
    llama = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB))
    llama.save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(corpus / "tokenizer").save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="a 'llama' model has no experts"):
        convert(tmp_path / "llama", tmp_path / "out")
    with pytest.raises(UserError, match="is a Select-MoE model already"):
        convert(convert(olmoe, tmp_path / "gated"), tmp_path / "out")
    with pytest.raises(UserError, match="has no quality gates"):
        convert_select_moe.compare(olmoe, olmoe)
    broken = tmp_path / "broken"
    load_model(olmoe).save_pretrained(broken, max_shard_size="8KB")
    file = sorted(broken.glob("*.safetensors"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or incomplete"):
        convert(broken, tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match=f"1 of .* weight files are missing, first {file.name}"):
        convert(broken, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
