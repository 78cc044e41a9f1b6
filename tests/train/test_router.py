"""Training of gates: on any split of the global batch the same, of nothing but gates, and what is refused."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from gated import convert
from jobs import ROOT, launch
from safetensors.torch import load_file

from ds_llm.config import run as config
from ds_llm.data.corrupt import CorruptedPairs
from ds_llm.errors import ConfigError, UserError
from ds_llm.models import quality_loss
from ds_llm.models.head import attach_loss_head, lm_loss
from ds_llm.models.quality_gate import record_scores
from ds_llm.pretrained import partial
from ds_llm.pretrained.loading import load_model, load_tokenizer
from ds_llm.tracking import metrics_file as metrics
from ds_llm.train import trainer
from ds_llm.train.modes import router


@pytest.fixture
def arguments(gate_training) -> list[str]:
    return [*gate_training, "router.quality_weight=3", "router.held_out=4"]


def run(arguments: list[str], output: Path) -> list[dict]:
    assert trainer.train(config.load(None, [*arguments, f"output={output}"])) == 0
    return [r for r in metrics.read(output / "metrics.jsonl") if r["kind"] == "step"]


def on_two(arguments: list[str], output: Path) -> list[dict]:
    done = launch("forked", [*arguments, f"output={output}"])
    assert done.returncode == 0, done.stdout + done.stderr
    return [r for r in metrics.read(output / "metrics.jsonl") if r["kind"] == "step"]


def trained(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / partial.WEIGHTS_FILE)


def first_batch(arguments: list[str], rows: int):
    """The model before training, its loss head ready, and the first global batch of a run with these arguments."""
    options = config.load(None, arguments)
    job = router.build(options, router.check(options))
    from ds_llm.data.order import SampleOrder

    batch = job.samples.batch(SampleOrder(len(job.samples), options.train.seed).take(0, rows))
    model = attach_loss_head(load_model(options.model.path, "fp32")).train()
    return model, batch


def by_hand(model, batch, loss: str, weight: float) -> tuple[float, dict[str, torch.Tensor]]:
    """The quality loss of one whole batch and the gates' gradients of the loss that stage 1 minimises, by autograd."""
    inputs = {n: batch[n] for n in ("input_ids", "labels", "position_ids", "token_mask") if n in batch}
    with record_scores() as scores:
        found = lm_loss(model, **inputs)
    mask = batch.get("token_mask")
    kind = quality_loss.find(loss)
    if kind.over == "pairs":
        with record_scores() as copies:
            lm_loss(model, **{**inputs, "input_ids": batch["corrupted_ids"]})
        count = int(batch["documents"].max()) + 1
        means = [quality_loss.sample_scores(part, batch["documents"], count) for part in (scores, copies)]
        quality = kind.function(*means).mean()
    else:
        quality, _ = quality_loss.batch_loss(loss, scores, mask, quality_loss.QualityOptions())
    valid = (batch["labels"] != -100).sum()
    model.zero_grad()
    (found.loss_sum / valid + weight * quality).backward()
    return float(quality.detach()), {n: p.grad for n, p in model.named_parameters() if "quality_gate" in n}


@pytest.mark.parametrize("loss", ["beta_moment_matching", "contrastive"])
def test_the_split_of_the_batch_does_not_matter(arguments, models, loss, tmp_path):
    """One process with four micro-batches against two with one each, under ZeRO 1 to 3, and autograd by hand."""
    arguments = [*arguments, f"router.quality_loss={loss}", "router.balance_weight=0", "optim.grad_clip=0"]
    one = run([*arguments, "zero=0", "train.batch_size=1", "train.accumulation_steps=4"], tmp_path / "one")
    weights, start = trained(tmp_path / "one"), load_model(models / "decoder").state_dict()
    assert set(weights) == {name for name in start if "quality_gate" in name}
    for stage in (1, 2, 3):
        two = on_two([*arguments, f"zero={stage}", "train.batch_size=2"], tmp_path / f"two{stage}")
        for a, b in zip(one, two, strict=True):
            for name in ("loss", "quality_loss", "gate_mean", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=1e-4), (stage, name)
        for name, value in trained(tmp_path / f"two{stage}").items():
            torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-5)
            assert (value - start[name]).abs().max() > 1e-3
    model, batch = first_batch(arguments, 4)
    quality, gradients = by_hand(model, batch, loss, 3.0)
    assert one[0]["quality_loss"] == pytest.approx(quality, rel=1e-5)
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    assert one[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_the_trained_part_loads_on_its_base_and_on_no_other(arguments, models, chats, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    arguments = [*arguments, f"model.path={models / 'chat'}", f"data.train={chats / 'train.jsonl'}", "data.seq_len=96"]
    arguments += [f"data.val={chats / 'val.jsonl'}", "router.train_routers=true", "router.quality_loss=ranking"]
    steps = run([*arguments, "train.batch_size=2", "train.activation_checkpointing=true"], output)
    assert all(0 <= step["pair_accuracy"] <= 1 for step in steps)
    (evaluated,) = (r for r in metrics.read(output / "metrics.jsonl") if r["kind"] == "eval")
    of_evaluations, of_steps = router.figures(config.load(None, arguments))
    assert set(of_evaluations) <= evaluated.keys() and set(of_steps) <= steps[-1].keys()
    assert evaluated["goal"] == "quality_loss" and evaluated["perplexity"] > 1 and 0 <= evaluated["pair_accuracy"] <= 1
    weights, base = trained(output), load_model(models / "chat").state_dict()
    names = {name for name in base if "quality_gate" in name or name.endswith("mlp.gate.weight")}
    assert set(weights) == names and len(names) == 4
    found = load_model(output).state_dict()
    for name, value in found.items():
        assert torch.equal(value, weights[name] if name in names else base[name]), name
    assert all(not torch.equal(found[name], base[name]) for name in names)
    assert load_tokenizer(output).chat_template == load_tokenizer(models / "chat").chat_template
    monkeypatch.setattr(sys, "argv", ["export.py", "--model", str(output), "--out", str(tmp_path / "whole")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "launch/export.py"), run_name="__main__")
    assert end.value.code == 0 and "read back from fp32" in capsys.readouterr().out
    exported = load_model(tmp_path / "whole").state_dict()
    assert all(torch.equal(exported[name], value) for name, value in found.items())
    # optimizer states are of the trained weights alone: two moments and the fp32 copy, beside the weights themselves
    state = next((output / "checkpoints").glob("*/deepspeed/*optim_states.pt")).stat().st_size
    assert state < 3 * 4 * sum(value.numel() for value in weights.values()) + 20_000
    with torch.no_grad():
        model = load_model(models / "chat")
        model.get_input_embeddings().weight[0] += 1
    model.save_pretrained(models / "chat" / "other")
    with pytest.raises(UserError, match="was trained on other weights"):
        partial.load(model, output / "model", str(models / "chat" / "other"))


def test_a_continued_run_ends_bitwise_alike(arguments, models, tmp_path):
    """With noise in the place of what gates hold back, a loss that takes two passes, and averaged weights."""
    convert(models / "original", tmp_path / "noisy", trash="noise")
    arguments = [*arguments, f"model.path={tmp_path / 'noisy'}", "router.quality_loss=mean_variance_regularization"]
    arguments += ["checkpoint.every_steps=1", "checkpoint.keep=0", "ema.enabled=true", "train.batch_size=2"]
    whole = run(arguments, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole/checkpoints/step-00000001", tmp_path / "continued/checkpoints/step-00000001")
    resumed = run(arguments, tmp_path / "continued")
    assert metrics.deterministic(resumed) == metrics.deterministic(whole)[1:]
    for name, value in trained(tmp_path / "whole").items():
        assert torch.equal(trained(tmp_path / "continued")[name], value)


def test_low_rank_adapters_of_the_routers_under_zero_3(arguments, models, tmp_path):
    arguments = [*arguments, "router.train_routers=true", "lora.enabled=true", "lora.r=2", "zero=3"]
    on_two([*arguments, "train.batch_size=2"], tmp_path / "run")
    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert {tuple(value.shape) for name, value in saved.items() if "lora_A" in name} == {(2, 32)}
    base, found = (load_model(path).state_dict() for path in (models / "decoder", tmp_path / "run"))
    assert base.keys() == found.keys()
    changed = {name for name in base if not torch.equal(base[name], found[name])}
    assert changed == {name for name in base if "quality_gate" in name or name.endswith("mlp.gate.weight")}
    for name in changed:
        if name.endswith("mlp.gate.weight"):
            assert torch.linalg.matrix_rank(found[name] - base[name], rtol=1e-3) <= 2


def test_the_subset_is_drawn_once(arguments, corpus):
    found = []
    for seed in (0, 0, 1):
        options = config.load(None, [*arguments, f"train.seed={seed}", "router.quality_loss=contrastive"])
        job = router.build(options, router.check(options))
        assert isinstance(job.samples, CorruptedPairs) and len(job.samples) == round(
            0.4 * len(job.samples.samples.samples)
        )
        found.append(job.samples.batch(range(len(job.samples)))["input_ids"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_mistakes_are_named_before_anything_is_loaded(arguments, models):
    def message(*overrides: str) -> str:
        with pytest.raises(UserError) as error:
            router.check(config.load(None, [*arguments, *overrides]))
        return str(error.value)

    assert "without gates; convert it first: python launch/convert.py" in message(f"model.path={models / 'original'}")
    assert "did you mean contrastive" in message("router.quality_loss=contrast")
    assert "set router.train_routers=true" in message("lora.enabled=true")
    assert "lora.dropout" in message("lora.enabled=true", "router.train_routers=true", "lora.dropout=0.1")
    assert "router.corruptions" in message("router.corruptions=[shuffel]")
    assert "model.freeze" in message("model.freeze=[model]")
    with pytest.raises(ConfigError, match=r"data\.subset_ratio: is for router"):
        config.load(None, ["data.subset_ratio=0.5"])
