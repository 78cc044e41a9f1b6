"""Fine-tuning: ragged masks in one and two processes, resumed adapters, held-out loss, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from jobs import TRACKED, launch
from multirank.test_resume import same_state
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_llm.config import run as config
from ds_llm.convert.export import export
from ds_llm.errors import ConfigError, UserError
from ds_llm.tracking import metrics_file as metrics
from ds_llm.train import trainer
from ds_llm.train.modes import sft

STEPS = 6


@pytest.fixture
def arguments(chats, monkeypatch, tmp_path_factory) -> list[str]:
    monkeypatch.setenv("DS_LLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    return [
        "mode=sft",
        f"data.train={chats / 'train.jsonl'}",
        f"data.val={chats / 'val.jsonl'}",
        "data.seq_len=96",
        f"model.path={chats / 'decoder'}",
        "train.batch_size=2",
        "train.dtype=fp32",
        f"train.max_steps={STEPS}",
        "optim.lr=1e-2",
        "eval.before=false",
        "checkpoint.every_steps=2",
        "checkpoint.keep=0",
        *TRACKED,
    ]


def run(processes: int, arguments: list[str], output: Path) -> list[dict]:
    arguments = [*arguments, f"output={output}"]
    if processes == 1:
        assert trainer.train(config.load(None, arguments)) == 0
    else:
        done = launch("forked", arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    return metrics.read(output / "metrics.jsonl")


def of_kind(records: list[dict], kind: str, name: str) -> list[float]:
    return [r[name] for r in records if r["kind"] == kind]


def held_out_loss(folder: Path, rows: Path) -> tuple[float, int]:
    """Mean cross-entropy in float64 of what the assistant says, one conversation at a time, by the template's marks."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).double().eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    model.eval()
    total, count = 0.0, 0
    for line in rows.read_text().splitlines():
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        ids = encoded["input_ids"]
        said = torch.as_tensor(encoded["assistant_masks"]).view(-1).bool()[1:][: 96 - 1]
        with torch.no_grad():
            found = torch.log_softmax(model(input_ids=ids[:, :96]).logits[0, :-1], -1)
        total -= float(found.gather(-1, ids[0, 1:96, None]).view(-1)[said].sum())
        count += int(said.sum())
    return total / count, count


def test_adapters_under_zero_3_continue_bitwise_and_export(arguments, chats, tmp_path):
    arguments = [*arguments, "zero=3", "lora.enabled=true", "lora.r=4", "lora.dropout=0.1", "ema.enabled=true"]
    whole = run(2, arguments, tmp_path / "whole")
    output = tmp_path / "continued"
    early = "checkpoints/step-00000002"
    shutil.copytree(tmp_path / "whole" / early, output / early)
    resumed = run(2, arguments, output)
    assert of_kind(resumed, "step", "loss") == of_kind(whole, "step", "loss")[2:]
    last = f"checkpoints/step-{STEPS:08d}"
    same_state(tmp_path / "whole" / last, output / last)
    states = torch.load(next((output / last / "deepspeed").glob("*model_states.pt")), weights_only=False)
    assert states["module"] and all("lora_" in name for name in states["module"])
    adapter = load_file(output / "model" / "adapter_model.safetensors")
    assert len(adapter) == 16 and all(w.numel() and w.abs().sum() > 0 for w in adapter.values())
    found = export(output, tmp_path / "merged")
    assert found.effect > 1e-2
    evaluation = [r for r in resumed if r["kind"] == "eval"][-1]
    loss, count = held_out_loss(tmp_path / "merged", chats / "val.jsonl")
    assert evaluation["tokens"] == count
    assert evaluation["loss"] == pytest.approx(loss, rel=1e-5)
    assert evaluation["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_one_and_two_processes_learn_alike(arguments, tmp_path):
    prompt = ["eval.prompts=[reverse red blue]", "eval.max_new_tokens=4"]
    two = run(2, [*arguments, "zero=2"], tmp_path / "two")
    one = run(1, [*arguments, *prompt, "zero=0", "train.accumulation_steps=2"], tmp_path / "one")
    assert of_kind(one, "step", "tokens") == of_kind(two, "step", "tokens")
    assert len(set(map(int, torch.tensor(of_kind(one, "step", "tokens")).diff()))) > 1  # the masks are ragged
    for kind, name in (("step", "loss"), ("step", "grad_norm"), ("eval", "loss")):
        assert of_kind(one, kind, name) == pytest.approx(of_kind(two, kind, name), rel=1e-4)
    assert of_kind(one, "step", "loss")[-1] < of_kind(one, "step", "loss")[0]
    (samples,) = of_kind(one, "eval", "samples")
    assert [s["prompt"] for s in samples] == ["reverse red blue"]


def test_samples_are_packed_or_grouped_and_named_by_their_fingerprint(arguments):
    packed = sft.check(config.load(None, arguments))
    again = sft.check(config.load(None, arguments))
    grouped = sft.check(
        config.load(None, [*arguments, "data.packing=false", "data.tokens_per_batch=300", "train.batch_size=1"])
    )
    last = sft.check(config.load(None, [*arguments, "data.train_on=last"]))
    assert packed.fingerprint == again.fingerprint
    assert len({json.dumps(d.fingerprint, sort_keys=True) for d in (packed, grouped, last)}) == 3

    def sums(samples) -> tuple[int, int]:
        batches = [samples.batch([i]) for i in range(len(samples))]
        labels = sum(int((b["labels"] != -100).sum()) for b in batches)
        return labels, sum(int(b["input_ids"].numel()) for b in batches)

    (labels, tokens), (same, padded), (fewer, _) = (sums(d.train) for d in (packed, grouped, last))
    assert labels == same > fewer > 0
    assert tokens <= padded and max(grouped.train.batch([i])["labels"].numel() for i in range(3)) <= 300


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["model.path=null"], "model.path: sft fine-tunes a model"),
        (["data.train=[]"], "data.train: name the samples"),
        (["data.packing=false"], "train.batch_size: 2 must be 1"),
        (["data.tokens_per_batch=400"], "data.tokens_per_batch: is for data.packing=false"),
        (["data.packing=false", "train.batch_size=1", "data.tokens_per_batch=50"], "is less than data.seq_len=96"),
        (["data.seq_len=500"], "data.seq_len: 500 tokens are more than the model's 128 positions"),
        (["eval.stride=4"], "eval.stride: is for pretrain"),
        (["data.weights=[1,2]"], "weights"),
        (["data.train=/nowhere.jsonl"], "/nowhere.jsonl"),
        ([f"eval.prompts=[{'a ' * 200}]"], "the model 128 positions"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(arguments, overrides, text):
    with pytest.raises((ConfigError, UserError)) as raised:
        sft.check(config.load(None, [*arguments, *overrides]))
    assert text in str(raised.value) and "\n" not in str(raised.value)
