"""The dpo mode: where it starts, what it learns, what it refuses, and plain torch against it on two processes."""

import json
import math
import random

import pytest
import torch
from jobs import PATIENCE, start

from ds_llm.config import run as config
from ds_llm.data.order import SampleOrder
from ds_llm.data.tokenizer import train_tokenizer
from ds_llm.errors import ConfigError, UserError
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM
from ds_llm.tracking import metrics_file as metrics
from ds_llm.train import trainer

COLOURS = ["red", "green", "blue", "black", "white", "brown"]


def pair(number: int) -> dict:
    draw = random.Random(number)
    right, wrong = draw.sample(COLOURS, 2)
    prompt = f"{draw.choice(['say', 'name', 'give'])} {right}{draw.choice([' please', '', ' now'])}"
    return {"prompt": prompt, "chosen": f"{right} it is", "rejected": wrong}


def decoder(folder, tokenizer, seed: int, **overrides):
    torch.manual_seed(seed)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64} | overrides
    c = config.load(None, [f"model.{k}={v}" for k, v in sizes.items()])
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("pad", "bos", "eos")}
    model = DecoderForCausalLM(DecoderConfig.from_model_config(c.model, len(tokenizer), **ids))
    with torch.no_grad():  # weights of a trained model's size, so that its answers differ in probability
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with pairs to train and evaluate on, a start model, another one and a mixture of experts."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("dpo")
    rows = [pair(i) for i in range(240)]
    for name, part in (("train", rows[:200]), ("val", rows[200:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": " ".join(r.values())}) + "\n" for r in rows))
    train_tokenizer([folder / "text.jsonl"], folder / "tokenizer", vocab_size=320)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    decoder(folder / "model", tokenizer, 0)
    decoder(folder / "other", tokenizer, 1)
    decoder(folder / "moe", tokenizer, 2, use_moe="true", n_routed_experts=4)
    return folder


@pytest.fixture
def overrides(world, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("DS_LLM_CACHE", str(tmp_path / "cache"))
    return [
        "mode=dpo",
        f"model.path={world / 'model'}",
        f"data.train={world / 'train.jsonl'}",
        f"data.val={world / 'val.jsonl'}",
        f"output={tmp_path / 'run'}",
        "train.batch_size=4",
        "train.dtype=fp32",
        "optim.lr=1e-3",
        "zero=0",
        "tracking.report=false",
        "tracking.tensorboard=false",
    ]


def run(*arguments) -> list[dict]:
    c = config.load(None, list(arguments))
    assert trainer.train(c) == 0
    return metrics.read(f"{c.output}/metrics.jsonl")


def of_kind(records, kind: str) -> list[dict]:
    return [r for r in records if r["kind"] == kind]


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


def answer_log_probs(model, tokenizer, row: dict, side: str) -> tuple[torch.Tensor, int]:
    """Summed log-probability of an answer from whole logits, one sequence at a time."""
    prompt = [{"role": "user", "content": row["prompt"]}]
    head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": row[side]}], tokenize=False)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    begin = len(tokenizer(head, add_special_tokens=False)["input_ids"])
    end = next(i for i in range(begin, len(ids)) if ids[i] == tokenizer.eos_token_id) + 1
    logits = model(ids[None]).logits[0].log_softmax(-1)
    found = logits[torch.arange(begin - 1, end - 1), ids[begin:end]]
    return found.sum(), end - begin


def by_hand(world, loss: str, reference: str | None, steps: int, batch: int, lr: float):
    """Losses, margins and gradient norms of plain torch in float64 on the whole global batch, one pair at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float64)
    frozen = AutoModelForCausalLM.from_pretrained(world / (reference or "model"), dtype=torch.float64)
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95)
    )
    order, found = SampleOrder(len(rows), 0), []
    for step in range(steps):
        total, margins = 0.0, 0.0
        for i in order.take(step * batch, batch):
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
            (part / batch).backward()
            total, margins = total + part.item(), margins + margin.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append((total / batch, margins / batch, norm.item()))
    return found, model.state_dict()


def same(output, expected, weights) -> None:
    """The steps and the exported model of a run are those worked out by hand."""
    from safetensors.torch import load_file

    found = of_kind(metrics.read(output / "metrics.jsonl"), "step")
    for record, (value, margin, norm) in zip(found, expected, strict=True):
        assert record["loss"] == pytest.approx(value, rel=1e-5)
        assert record["margin"] == pytest.approx(margin, abs=1e-5)
        assert record["grad_norm"] == pytest.approx(norm, rel=2e-3)
    for name, tensor in load_file(output / "model" / "model.safetensors").items():
        assert torch.allclose(tensor.double(), weights[name], atol=2e-4), name


def steps(overrides, output, **options) -> list[str]:
    """Arguments of 3 steps on 16 pairs each."""
    options = {"train.max_steps": 3, "optim.schedule": "constant", "optim.warmup_steps": 0, "output": output} | options
    return [*overrides, *(f"{k}={v}" for k, v in options.items())]


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
        same(tmp_path / f"zero{stage}", *by_hand(world, "sigmoid", reference, steps=3, batch=16, lr=1e-3))


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
    same(tmp_path / "run", *by_hand(world, "orpo", None, steps=3, batch=16, lr=1e-3))
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
