"""The dpo mode: where it starts, what it learns, what it refuses, and plain torch against it on two processes."""

import math

import pytest
import torch
from jobs import PATIENCE, start
from preferences import (
    BATCH,
    STEPS,
    adamw,
    answer_log_probs,
    in_float64,
    make_models,
    of_kind,
    pair,
    read,
    run,
    same,
    steps,
    update,
    usual,
    write,
)

from ds_llm.config import run as config
from ds_llm.data.order import SampleOrder
from ds_llm.errors import ConfigError, UserError
from ds_llm.tracking import metrics_file as metrics
from ds_llm.train import trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with pairs to train and evaluate on, a start model, another one and a mixture of experts."""
    folder = tmp_path_factory.mktemp("dpo")
    rows = [pair(i) for i in range(240)]
    write(folder / "train.jsonl", rows[:200])
    write(folder / "val.jsonl", rows[200:])
    make_models(folder, rows)
    return folder


@pytest.fixture
def overrides(world, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("DS_LLM_CACHE", str(tmp_path / "cache"))
    return usual(world, tmp_path / "run", "dpo")


@pytest.mark.parametrize("model, more", [("model", []), ("moe", ["zero=2"]), ("model", ["lora.enabled=true"])])
def test_begins_at_the_reference_and_learns_the_preference(overrides, world, tmp_path, model, more):
    records = run(*overrides, f"model.path={world / model}", "train.max_steps=20", "tracking.report=true", *more)
    first, last = of_kind(records, "eval")[0], of_kind(records, "eval")[-1]
    assert first["step"] == 0 and first["goal"] == "loss"
    step = of_kind(records, "step")[0]
    for figures in (first, step):
        assert figures["loss"] == pytest.approx(math.log(2), rel=1e-7)
        assert figures["margin"] == 0 and figures["accuracy"] == 0.5
    assert "ppl" not in step and (model == "model" or "expert_load" in step)
    assert last["accuracy"] > 0.9 and last["margin"] > 0.1 and last["loss"] < 0.65, last
    assert last["best_loss"] == last["loss"] and last["pairs"] == 40
    page = (tmp_path / "run" / "report.html").read_text()
    for title in (
        "Rewards and their margin",
        "Preference accuracy on the evaluation set",
        "Loss on the evaluation set",
    ):
        assert title in page
    assert of_kind(records, "summary")[0]["best_loss"] == last["loss"]


def by_hand(world, loss: str, reference: str | None):
    """Figures of plain torch in float64 on the whole global batch, one pair at a time, and the weights at the end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    model, frozen = in_float64(world, "model"), in_float64(world, reference or "model")
    rows, optimizer = read(world / "train.jsonl"), adamw(model)
    order, found = SampleOrder(len(rows), 0), []
    for step in range(STEPS):
        total, margins = 0.0, 0.0
        for i in order.take(step * BATCH, BATCH):
            (c, n_c), (r, n_r) = (answer_log_probs(model, tokenizer, rows[i], s) for s in ("chosen", "rejected"))
            with torch.no_grad():
                (ref_c, _), (ref_r, _) = (
                    answer_log_probs(frozen, tokenizer, rows[i], s) for s in ("chosen", "rejected")
                )
            if loss == "sigmoid":
                margin = 0.1 * ((c - ref_c) - (r - ref_r))
                part = -torch.nn.functional.logsigmoid(margin)
            else:  # orpo
                mean_c, mean_r = c / n_c, r / n_r
                odds = mean_c - torch.log(1 - mean_c.exp()) - mean_r + torch.log(1 - mean_r.exp())
                margin = 0.1 * (mean_c - mean_r)
                part = -mean_c - 0.1 * torch.nn.functional.logsigmoid(odds)
            (part / BATCH).backward()
            total, margins = total + part.item(), margins + margin.item()
        norm = update(model, optimizer)
        found.append({"loss": total / BATCH, "margin": margins / BATCH, "grad_norm": norm})
    return found, model.state_dict()


def test_two_processes_equal_plain_torch(overrides, world, tmp_path):
    """ZeRO-2 with the start model as the reference, ZeRO-3 with another one, both with accumulation."""
    jobs = {}
    for stage, reference in ((2, None), (3, "other")):
        more = {"dpo.reference": world / reference} if reference else {}
        arguments = steps(overrides, tmp_path / f"zero{stage}", zero=stage, **{"train.accumulation_steps": 2}, **more)
        jobs[stage] = reference, start("forked", arguments, DS_LLM_CACHE=str(tmp_path / "cache"))
    for stage, (reference, job) in jobs.items():
        out, err = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, out[-3000:] + err[-3000:]
        assert err.strip() == "", err
        same(tmp_path / f"zero{stage}", *by_hand(world, "sigmoid", reference))


def test_shared_experts_change_nothing(overrides, world, tmp_path):
    jobs, found = [], []
    for size in (1, 2):
        more = {"zero": 2, "model.path": world / "moe", "parallel.expert": size}
        arguments = steps(overrides, tmp_path / str(size), **more)
        jobs.append(start("forked", arguments, DS_LLM_CACHE=str(tmp_path / f"cache{size}")))
    for size, job in enumerate(jobs, 1):
        out, err = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, out[-3000:] + err[-3000:]
        found.append(metrics.read(tmp_path / str(size) / "metrics.jsonl"))
    for alone, shared in zip(of_kind(found[0], "step"), of_kind(found[1], "step"), strict=True):
        for name, value in alone.items():
            if name in ("loss", "margin", "grad_norm", "aux_loss"):
                assert shared[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    for alone, shared in zip(of_kind(found[0], "eval"), of_kind(found[1], "eval"), strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def test_reference_free_equals_plain_torch(overrides, world, tmp_path):
    assert run(*steps(overrides, tmp_path / "run", **{"dpo.loss": "orpo", "train.batch_size": 16}))
    same(tmp_path / "run", *by_hand(world, "orpo", None))
    assert not list((tmp_path / "cache").glob("*/reference-*"))


def test_resumes_bitwise_without_scoring_again(overrides, tmp_path, capsys):
    arguments = [*overrides, "checkpoint.every_steps=4", "eval.every_steps=4", "optim.schedule=constant"]
    run(*arguments, "train.max_steps=8", f"output={tmp_path / 'whole'}")
    run(*arguments, "train.max_steps=4")
    capsys.readouterr()
    run(*arguments, "train.max_steps=8")
    out = capsys.readouterr().out
    assert "all 32 samples found" in out and "all 40 samples found" in out and "continuing from" in out
    one, other = (metrics.deterministic(metrics.read(tmp_path / n / "metrics.jsonl")) for n in ("whole", "run"))
    assert [r for r in one if r["kind"] in ("step", "eval")] == [r for r in other if r["kind"] in ("step", "eval")]
    files = [tmp_path / n / "model" / "model.safetensors" for n in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_stopped_while_scoring_it_continues(overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ds_llm.distributed.interrupt.Interrupt.requested", lambda self: True)
    assert trainer.train(config.load(None, overrides)) == 75
    assert "before the first step; the same command continues" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setenv("DS_LLM_CACHE", str(tmp_path / "cache"))
    assert of_kind(run(*overrides, "train.max_steps=2"), "step")[0]["margin"] == 0


def test_refuses_what_cannot_work(overrides, world, tmp_path):
    for wrong, message, kind in (
        ("dpo.reference=nowhere/at/all", "nowhere/at/all: no such file", UserError),
        ("model.path=null", "model.path: dpo aligns a model", ConfigError),
        ("data.train=[]", "data.train: name the data", ConfigError),
        ("data.format=alpaca", "data.format: is for sft", ConfigError),
        ("eval.stride=4", "eval.stride: is for pretrain", ConfigError),
        ("dpo.label_smoothing=0.6", "must be less than 0.5", ConfigError),
        (f"data.train={world / 'text.jsonl'}", "no preference pair to train on; 240 missing field", UserError),
        ("data.seq_len=1000", "more than the model's 64 positions", UserError),
    ):
        with pytest.raises(kind, match=message):
            run(*overrides, wrong)
    with pytest.raises(ConfigError, match=r"dpo\.reference: the simpo loss has no reference"):
        run(*overrides, "dpo.loss=simpo", f"dpo.reference={world / 'other'}")
    assert not (tmp_path / "run").exists()
