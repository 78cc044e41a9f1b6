"""Export: the merged model is the model with its adapter, whole, or nothing is written."""

import pytest
import torch
from chats import EXPERTS, adapted, randomise
from jobs import ROOT, launch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_llm.convert.export import export
from ds_llm.errors import UserError
from ds_llm.generation.generator import Generator
from ds_llm.pretrained import lora as adapters
from ds_llm.pretrained.loading import load_model


@pytest.fixture
def adapter(chats, tmp_path):
    """Makes adapter folders with their tokenizer; returns the folder and the model with the adapter."""

    def make(name: str, *overrides: str):
        torch.manual_seed(1)
        model = adapted(chats, name, *overrides)
        folder = tmp_path / f"adapter-{name}"
        adapters.save_adapter(model, randomise(model), folder)
        AutoTokenizer.from_pretrained(chats / name).save_pretrained(folder)
        return folder, model.eval()

    return make


@pytest.mark.parametrize("name", ["llama", "decoder", "qwen3_moe"])
def test_merged_logits_are_those_of_the_adapter(adapter, tmp_path, chats, name):
    source, model = adapter(name, *([EXPERTS] if name == "decoder" else []))
    found = export(source, tmp_path / "out")
    assert found.base == str(chats / name) and found.dtype == "fp32"
    assert found.merge < 1e-5 < 1e-2 < found.effect and found.rounding < 1e-5
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(3, 250, (3, 30))
    with torch.no_grad():
        torch.testing.assert_close(written(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert not any("lora" in n for n in written.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(chats / name).chat_template


def test_command_writes_bf16_and_the_adapter_generates_alike(adapter, tmp_path):
    source, _ = adapter("llama")
    out = tmp_path / "out"
    arguments = ["--model", str(source), "--out", str(out), "--dtype", "bf16"]
    done = launch("forked-1", arguments, script=ROOT / "launch/export.py")
    assert done.returncode == 0, done.stderr
    assert "merged against adapter, fp32: largest difference of the logits" in done.stdout and done.stderr == ""
    assert load_model(out).dtype == torch.bfloat16
    export(source, tmp_path / "exact", "fp32")
    chat = [{"role": "user", "content": "reverse red blue"}]
    texts = [Generator(str(p)).chat(chat, temperature=0.0, max_new_tokens=12) for p in (source, tmp_path / "exact")]
    assert texts[0] == texts[1]


def test_nothing_is_overwritten_or_half_written(adapter, tmp_path, monkeypatch):
    source, _ = adapter("llama")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds something already"):
        export(source, taken)
    from peft.tuners.lora.layer import Linear

    exact = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: exact(self, name) * 1.2)
    with pytest.raises(UserError, match="merging the adapter changes the logits"):
        export(source, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists() and not (tmp_path / ".wrong.partial").exists()
