"""The trainers' benchmark gives both sides the same tokens and labels, and ends where their losses differ."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import trainers, trainers_run
from ds_llm.train import alignment, trainer
from ds_llm.train.modes import dpo

ARGUMENTS = {"seq_len": 96, "batch_size": 2, "accumulation_steps": 2, "steps": 2, "dtype": "fp32", "zero": [0, 2]}


@pytest.fixture
def job(chats, tmp_path, monkeypatch):
    """Makes the job of a mode on conversations, or on pairs of the right and a wrong answer."""
    monkeypatch.setenv("DS_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trainer, "Tracker", trainer.Tracker)  # what a contestant replaces comes back
    monkeypatch.setattr(alignment, "reference_log_probs", alignment.reference_log_probs)

    def make(mode: str) -> tuple[dict, list[dict]]:
        rows = (chats / "train.jsonl").read_text().splitlines(keepends=True)
        if mode == "dpo":
            turns = [json.loads(row)["messages"][:2] for row in rows]
            pairs = ({"prompt": q["content"], "chosen": a["content"], "rejected": "no"} for q, a in turns)
            rows = [json.dumps(pair) + "\n" for pair in pairs]
        made = trainers.write_job(SimpleNamespace(**ARGUMENTS), mode, chats / "llama", rows, tmp_path)
        return made, json.loads((tmp_path / f"{mode}.json").read_text())

    return make


@torch.no_grad()
def summed_loss(model, ids: list[int], labels: list[int]) -> torch.Tensor:
    """Cross-entropy of one document whose labels stand at the tokens they name."""
    logits = model(torch.tensor(ids)[None]).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")


def test_first_loss_of_packs(job, chats, tmp_path):
    made, rows = job("sft")
    assert set(made["deepspeed"]) == {"0", "2"} and made["deepspeed"]["2"]["zero_optimization"]["stage"] == 2
    found = trainers_run.ours(made | {"stage": 0}, tmp_path)
    model, total, count, tokens = AutoModelForCausalLM.from_pretrained(chats / "llama"), 0.0, 0, 0
    for row in rows[:4]:  # the batch of the first step
        at = 0
        for length in row["seq_lengths"]:
            part = slice(at, at + length)
            total += float(summed_loss(model, row["input_ids"][part], row["labels"][part]))
            at += length
        count += sum(label != -100 for label in row["labels"])
        tokens += len(row["input_ids"])
    assert any(len(row["seq_lengths"]) > 1 for row in rows) and made["tokens"][0] == tokens
    assert found["losses"][0] == pytest.approx(total / count, rel=1e-5)
    assert len(found["clock"]) == len(found["cpu"]) == 2 and found["reference_cpu_s"] is None


def test_first_losses_of_pairs(job, tmp_path):
    made, rows = job("dpo")
    found = trainers_run.ours(made | {"stage": 0}, tmp_path)
    assert found["losses"][0] == pytest.approx(math.log(2), rel=1e-6) and found["reference_cpu_s"] > 0
    stored = dpo.Pairs(next((tmp_path / "cache").glob("pairs/pairs-*")), 0)
    expected = {tuple(ids.tolist()): labels for i in range(len(stored)) for ids, labels in stored.pair(i)}
    for row in rows:
        for side in ("chosen", "rejected"):
            ids = row["prompt_ids"] + row[f"{side}_ids"]
            labels = next(labels for whole, labels in expected.items() if list(whole[: len(ids)]) == ids)
            assert [label for label in labels.tolist() if label != -100] == row[f"{side}_ids"]


def test_other_batches_end_it():
    ours, other = (trainers.Contestant("sft", name, 0) for name in ("ours", "trl"))
    run = {"losses": [2.0, 1.0]}
    assert trainers.check_losses({ours: [run], other: [{"losses": [2.0, 1.001]}]}, "fp32") == {
        ours.name: 0,
        other.name: pytest.approx(1e-3),
    }
    with pytest.raises(SystemExit, match="do not train on the same batches"):
        trainers.check_losses({ours: [run], other: [{"losses": [2.01, 1.0]}]}, "fp32")
