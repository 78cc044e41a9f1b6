"""Boosted models in training: SFT with a frozen part under ZeRO-3, adapters, DPO, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
from jobs import TRACKED, launch
from safetensors.torch import load_file

from ds_llm.config import run as config
from ds_llm.convert import boost as convert
from ds_llm.errors import ConfigError
from ds_llm.pretrained import lora as adapters
from ds_llm.pretrained.loading import load_model, load_tokenizer
from ds_llm.tracking import metrics_file as metrics
from ds_llm.train import trainer
from ds_llm.train.modes import sft
from ds_llm.train.start_model import start_model

STEPS = 4


@pytest.fixture(scope="module")
def boosted(chats, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("boosted")
    second = load_model(chats / "llama")
    for parameter in second.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    second.save_pretrained(folder / "second")
    load_tokenizer(chats / "llama").save_pretrained(folder / "second")
    convert.boost([chats / "llama", folder / "second"], folder / "fused", connection="gated")
    return folder / "fused"


@pytest.fixture
def arguments(chats, boosted, monkeypatch, tmp_path_factory) -> list[str]:
    monkeypatch.setenv("DS_LLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    return [
        f"model.path={boosted}",
        "data.seq_len=96",
        "train.batch_size=2",
        "train.dtype=fp32",
        f"train.max_steps={STEPS}",
        "optim.lr=1e-2",
        "eval.before=false",
        *TRACKED,
    ]


def supervised(chats: Path) -> list[str]:
    return ["mode=sft", f"data.train={chats / 'train.jsonl'}", f"data.val={chats / 'val.jsonl'}"]


def of_steps(output: Path, name: str) -> list[float]:
    return [r[name] for r in metrics.read(output / "metrics.jsonl") if r["kind"] == "step"]


def test_a_frozen_part_under_zero_3_learns_nothing_and_the_rest_as_on_one_process(arguments, chats, boosted, tmp_path):
    arguments = [*arguments, *supervised(chats), "model.freeze=[sub_models.0]", "train.activation_checkpointing=true"]
    done = launch("forked", [*arguments, "zero=3", f"output={tmp_path / 'two'}"])
    assert done.returncode == 0, done.stdout + done.stderr
    one = [*arguments, "zero=0", "train.accumulation_steps=2", f"output={tmp_path / 'one'}"]
    assert trainer.train(config.load(None, one)) == 0
    for name in ("loss", "grad_norm"):
        assert of_steps(tmp_path / "one", name) == pytest.approx(of_steps(tmp_path / "two", name), rel=1e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (boosted, tmp_path / "two" / "model"))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("sub_models.0."), name
    last = tmp_path / "two" / "checkpoints" / f"step-{STEPS:08d}" / "deepspeed"
    states = torch.load(next(last.glob("*model_states.pt")), weights_only=False)
    assert states["module"] and not any("sub_models.0." in name for name in states["module"])
    (evaluation,) = [r for r in metrics.read(tmp_path / "two" / "metrics.jsonl") if r["kind"] == "eval"]
    other = [r for r in metrics.read(tmp_path / "one" / "metrics.jsonl") if r["kind"] == "eval"]
    assert evaluation["loss"] == pytest.approx(other[-1]["loss"], rel=1e-4)


def test_preferences_are_learned_by_adapters_of_the_trained_part(arguments, chats, tmp_path):
    rows = [
        f'{{"prompt": "reverse {a} {b}", "chosen": "{b} {a}", "rejected": "{a} {b}"}}\n'
        for a in ("red", "blue", "green")
        for b in ("cat", "dog", "sun")
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(rows))
    output = tmp_path / "out"
    more = [
        "mode=dpo",
        f"data.train={tmp_path / 'pairs.jsonl'}",
        "lora.enabled=true",
        "lora.r=4",
        "zero=0",
        "dpo.beta=1",
    ]
    arguments = [
        *arguments,
        *more,
        "model.freeze=[sub_models.0]",
        f"output={output}",
        "train.max_steps=24",
        "optim.lr=5e-2",
    ]
    assert trainer.train(config.load(None, arguments)) == 0
    losses = of_steps(output, "loss")
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5) and losses[-1] < 0.68
    weights = load_file(output / "model" / "adapter_model.safetensors")
    assert weights and all("sub_models.1." in name and "lm_head" not in name for name in weights)
    assert any("prev_q_proj" in name for name in weights)
    found = convert.extract(output, 0, tmp_path / "first")
    assert found.made < 1e-5  # an adapter is merged before


def test_adapters_of_all_layers_leave_out_every_head(arguments, chats, boosted):
    settings = config.load(None, [*arguments, *supervised(chats), "lora.enabled=true", "lora.r=2"])
    adapters.check(settings)
    model = start_model(settings, load_tokenizer(boosted))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split("sub_models.")[1][0] for name in trained} == {"0", "1"}
    assert trained and not any("lm_head" in name for name in trained)


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["model.freeze=[sub_model.0]"], "did you mean 'sub_models.0'"),
        (["model.freeze=[sub_models]"], "leaves nothing to train"),
        (["model.freeze=[sub_models.0]", "lora.enabled=true", "lora.targets=[up_projs]"], "did you mean 'up_proj'"),
    ],
)
def test_what_cannot_be_frozen_is_refused(arguments, chats, overrides, text):
    with pytest.raises(ConfigError, match=text):
        sft.check(config.load(None, [*arguments, *supervised(chats), *overrides]))
