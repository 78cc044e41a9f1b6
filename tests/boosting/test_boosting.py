"""The whole recipe on a tiny model: what it leaves, that it goes on after a failure, and what it refuses to mix."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from jobs import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_llm.boosting import recipe as boosting
from ds_llm.config.options import load
from ds_llm.errors import ConfigError, UserError


@pytest.fixture
def options(chats, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("DS_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    training = "data.seq_len=96,train.dtype=fp32,train.batch_size=2,train.accumulation_steps=1,optim.lr=1e-2,zero=0"
    quiet = "tracking.report=false,tracking.tensorboard=false,'eval.prompts=[]',eval.before=false,train.max_steps=3"
    return [
        f"output={tmp_path / 'out'}",
        f"base={chats / 'llama'}",
        f"train=[{chats / 'train.jsonl'}]",
        f"val=[{chats / 'val.jsonl'}]",
        "launcher=python",
        f"training=[{training},{quiet}]",
    ]


@pytest.fixture
def commands(monkeypatch) -> list[str]:
    """Runs the launch scripts in this process; returns the list of those that ran. A script named in `broken` fails."""
    ran = []

    def run(self, script: str, arguments: list[str]) -> None:
        target = (
            next(Path(a.partition("=")[2]).name for a in arguments if a.startswith("output="))
            if (script == "train.py")
            else Path(arguments[arguments.index("--out") + 1]).stem
        )
        if target in ran.broken:
            raise UserError(f"{script} ended with exit code 1")
        ran.append(target)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(self.launch / script), run_name="__main__")
        assert not end.value.code, (script, arguments)

    class Ran(list):
        broken: tuple = ()

    ran = Ran()
    monkeypatch.setattr(boosting.Recipe, "_command", run)
    return ran


def recipe(arguments: list[str]) -> boosting.Recipe:
    return boosting.Recipe(load(boosting.BoostingConfig, None, arguments), ROOT / "launch")


def held_out_loss(folder: Path, rows: Path) -> tuple[float, int]:
    """Mean cross-entropy in float64 of what the assistant says, one conversation at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for line in rows.read_text().splitlines():
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        ids, said = encoded["input_ids"], torch.as_tensor(encoded["assistant_masks"]).view(-1).bool()[1:]
        with torch.no_grad():
            found = model.double().eval()(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= float(found.gather(-1, ids[0, 1:, None]).view(-1)[said].sum())
        count += int(said.sum())
    return total / count, count


def test_from_base_to_report_and_on_after_a_failure(options, commands, chats, tmp_path):
    out = tmp_path / "out"
    more = [*options, "weighted_sft=true", "resample.method=brownboost", "connection=linear"]
    commands.broken = ("fused",)
    with pytest.raises(UserError, match="exit code 1"):
        recipe(more).run()
    assert commands == ["entropy_0", "sft", "entropy_1", "weighted", "entropy_2"]
    commands.clear()
    commands.broken = ()
    report = recipe(more).run()
    models = ["base", "sft", "weighted", "vote", "boosted", "extracted", "plain"]
    assert commands == ["fused", "plain", *models]
    assert [row["model"] for row in report["models"]] == models
    assert [row["steps"] for row in report["models"]] == [0, 3, 6, 6, 9, 9, 9]
    folders = {"base": chats / "llama", "boosted": out / "fused" / "model", "extracted": out / "extracted"}
    for row in report["models"]:
        if row["model"] in folders:
            loss, count = held_out_loss(folders[row["model"]], chats / "val.jsonl")
            assert row["loss"] == pytest.approx(loss, rel=1e-4) and report["tokens"] == count
    drawn = json.loads((out / "resample.jsonl.report.json").read_text())
    assert (
        drawn["method"] == "brownboost"
        and drawn["drawn"] == 150 == len((out / "resample.jsonl").read_text().split("\n")) - 1
    )
    commands.clear()
    assert recipe(more).run() == report and commands == []
    with pytest.raises(UserError, match=r"stage resample was finished with other settings \(alpha\)"):
        recipe([*more, "resample.alpha=2"]).run()
    again = recipe([*more, "resample.alpha=2", "skip=[plain,compare]"])
    again.redo("resample")
    assert (out / "vote").exists() and not (out / "fused").exists() and not (out / "extracted").exists()
    assert again.run() is None and commands == ["fused"]


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["base=''"], "base: not given"),
        (["resample.method=brownboost"], "set weighted_sft=true"),
        (["launcher=mpirun"], "must begin with deepspeed, torchrun or python"),
        (["skip=[plan]"], "'plan' is no stage"),
        (["recipe=/nowhere.yaml"], "no such file"),
        (["resample.methode=x"], r"did you mean 'resample\.method'"),
    ],
)
def test_mistakes_are_found_before_anything_runs(options, overrides, text, commands):
    with pytest.raises(ConfigError, match=text):
        recipe([*options, *overrides])
    assert commands == []


def test_a_skipped_stage_needs_its_result(options, commands):
    with pytest.raises(UserError, match=r"skip: entropy_0 leaves .*entropy_0\.jsonl, which is not there"):
        recipe([*options, "skip=[entropy_0]"]).run()
