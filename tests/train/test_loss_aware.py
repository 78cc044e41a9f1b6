"""Gates that follow the model's own loss on each document: against the original model run on every document alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import launch
from safetensors.torch import load_file

from ds_llm.config import run as config
from ds_llm.data.order import SampleOrder
from ds_llm.errors import UserError
from ds_llm.models.quality_gate import gates, record_scores
from ds_llm.pretrained import partial
from ds_llm.pretrained.loading import load_model
from ds_llm.tracking import metrics_file as metrics
from ds_llm.train import trainer
from ds_llm.train.modes import router


@pytest.fixture
def arguments(gate_training) -> list[str]:
    own = ["router.quality_loss=loss_aware", "router.quality_weight=2", "router.held_out=5", "router.balance_weight=0"]
    return [*gate_training, *own, "optim.grad_clip=0"]


def documents(batch: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels) of each document with a label, where rows are cut at positions of 0 and padding is left out."""
    found = []
    for row, ids in enumerate(batch["input_ids"]):
        mask = batch.get("attention_mask", batch.get("token_mask"))
        kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[row].bool()
        positions = batch["position_ids"][row] if "position_ids" in batch else torch.arange(len(ids))
        starts = [i for i in range(len(ids)) if i == 0 or positions[i] == 0]
        for first, last in zip(starts, [*starts[1:], len(ids)], strict=True):
            here = torch.arange(first, last)[kept[first:last]]
            if len(here) and (batch["labels"][row, here] != -100).any():
                found.append((ids[here], batch["labels"][row, here]))
    return found


def measured(original, gated, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss of every document under the model without gates, and its mean score under the one with them."""
    losses, scores = [], []
    for ids, labels in documents(batch):
        with torch.no_grad():
            logits = original(input_ids=ids[None]).logits[0]
        losses.append(F.cross_entropy(logits, labels, ignore_index=-100))
        with record_scores() as found:
            gated(input_ids=ids[None])
        scores.append(torch.cat([layer.mean()[None] for layer in found]).mean())
    return torch.stack(losses), torch.stack(scores)


def expected(losses: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    surprise = (losses - losses.mean()) / losses.std(correction=0)
    return (10 * scores + surprise).square().mean()


def records(output: Path, kind: str) -> list[dict]:
    return [r for r in metrics.read(output / "metrics.jsonl") if r["kind"] == kind]


def built(arguments: list[str]):
    options = config.load(None, arguments)
    return router.build(options, router.check(options)), options


def test_the_split_of_the_batch_does_not_matter(arguments, models, tmp_path):
    """One process with four micro-batches against two with one each, under ZeRO-3, and against autograd by hand."""
    split = ["zero=0", "train.batch_size=1", "train.accumulation_steps=4", f"output={tmp_path / 'one'}"]
    assert trainer.train(config.load(None, [*arguments, *split])) == 0
    done = launch("forked", [*arguments, "zero=3", "train.batch_size=2", f"output={tmp_path / 'two'}"])
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (records(tmp_path / name, "step") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "quality_loss", "gate_mean", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    weights, other = (load_file(tmp_path / name / "model" / partial.WEIGHTS_FILE) for name in ("one", "two"))
    for name, value in weights.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)

    job, options = built(arguments)
    batch = job.samples.batch(SampleOrder(len(job.samples), options.train.seed).take(0, 4))
    original, gated = load_model(models / "original", "fp32"), load_model(models / "decoder", "fp32")
    quality = expected(*measured(original, gated, batch))
    assert one[0]["quality_loss"] == pytest.approx(quality.item(), rel=1e-4)
    valid = (batch["labels"] != -100).sum()
    loss = sum(
        F.cross_entropy(gated(input_ids=ids[None]).logits[0], labels, ignore_index=-100, reduction="sum")
        for ids, labels in documents(batch)
    )
    (loss / valid + 2 * quality).backward()
    norm = torch.stack([gate.weight.grad.square().sum() for gate in gates(gated)]).sum().sqrt()
    assert one[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-3)

    first, second = (records(tmp_path / name, "eval")[-1] for name in ("one", "two"))
    held_out = SampleOrder(len(job.samples.samples), options.train.seed).take(len(job.samples), 5)
    with torch.no_grad():
        losses, scores = measured(original, load_model(tmp_path / "one"), job.samples.samples.batch(held_out))
    correlation = np.corrcoef(losses, scores)[0, 1]
    for row in (first, second):
        assert row["goal"] == "quality_loss"
        assert row["loss_correlation"] == pytest.approx(correlation, abs=2e-3)
        assert row["quality_loss"] == pytest.approx(float(expected(losses, scores)), rel=2e-3)


def test_only_answers_count_and_gates_come_to_follow_the_loss(arguments, models, chats, tmp_path, capsys):
    """On padded conversations, of which the model's loss is that on the answers."""
    arguments = [*arguments, f"model.path={models / 'chat'}", f"data.train={chats / 'train.jsonl'}", "data.seq_len=96"]
    arguments += ["data.packing=false", "data.tokens_per_batch=600", "train.batch_size=1", "data.subset_ratio=1"]
    arguments += ["train.max_steps=12", "router.quality_loss_debug=true"]
    job, options = built(arguments)
    batch = job.samples.batch(SampleOrder(len(job.samples), options.train.seed).take(0, 1))
    assert (batch["attention_mask"] == 0).any() and len(batch["labels"]) > 4
    original, gated = load_model(chats / "qwen3_moe", "fp32"), load_model(models / "chat", "fp32")
    with torch.no_grad():
        losses, scores = measured(original, gated, batch)
    assert trainer.train(config.load(None, [*arguments, f"output={tmp_path / 'run'}"])) == 0
    steps = records(tmp_path / "run", "step")
    assert steps[0]["quality_loss"] == pytest.approx(float(expected(losses, scores)), rel=1e-3)
    assert steps[-1]["quality_loss"] < 0.7 * steps[0]["quality_loss"]
    printed = capsys.readouterr().out
    assert f"quality loss loss_aware: {steps[0]['quality_loss']:.4g} (this micro-batch " in printed
    assert f"  quality {steps[0]['quality_loss']:.4f}  " in printed


def test_a_batch_of_one_document_is_refused(arguments, models, chats, tmp_path):
    arguments = [*arguments, f"model.path={models / 'chat'}", f"data.train={chats / 'train.jsonl'}", "data.seq_len=96"]
    arguments += ["data.packing=false", "data.tokens_per_batch=96", "train.batch_size=1", f"output={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"holds 1 that can be; raise train\.batch_size"):
        trainer.train(config.load(None, arguments))
