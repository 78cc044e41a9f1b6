"""Losses and weights that are not finite, and tokens that are not what they were."""

import math
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hostile import one_line
from safetensors.torch import load_file, save_file

from ds_llm.checkpoint import folder as checkpoint
from ds_llm.config import run as config
from ds_llm.data.order import SampleOrder
from ds_llm.data.tokens import TokenData, TokenWriter, index_path
from ds_llm.errors import UserError
from ds_llm.tracking import metrics_file as metrics
from ds_llm.train import trainer

SEQ, BATCH, STEPS = 16, 2, 8


@pytest.fixture(scope="module")
def data(chats, tmp_path_factory) -> Path:
    """A token file of the tokenizer of the chats, one token of which is rare: the last one of the vocabulary."""
    from ds_llm.data.tokens import tokenizer_hash
    from ds_llm.pretrained.loading import load_tokenizer

    path = tmp_path_factory.mktemp("tokens") / "train.bin"
    tokenizer = load_tokenizer(chats / "llama")
    about = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    random_numbers = np.random.default_rng(random.SystemRandom().randrange(2**32))
    with TokenWriter(path, tokenizer_hash=tokenizer_hash(tokenizer), tokenizer=str(chats / "llama"), **about) as writer:
        tokens = random_numbers.integers(5, len(tokenizer) - 1, BATCH * STEPS * SEQ + 1)
        tokens[random_numbers.integers(0, BATCH * STEPS, 2) * SEQ + SEQ // 2] = len(tokenizer) - 1  # in 1 or 2 samples
        writer.append(tokens, np.array([len(tokens)]))
    return path


def settings(data: Path, model: Path, output: Path, *more: str) -> config.Config:
    keys = [f"data.train={data}", f"model.path={model}", f"output={output}", f"data.seq_len={SEQ}", "zero=0"]
    keys += [f"train.batch_size={BATCH}", f"train.max_steps={STEPS}", "train.dtype=fp32", "checkpoint.every_steps=1"]
    keys += ["tracking.log_every=1", "tracking.report=false", "tracking.tensorboard=false", "optim.warmup_steps=0"]
    return config.load(None, [*keys, *more])


def with_row(model: Path, folder: Path, value: float) -> Path:
    """The model, with one embedding all `value`: that of the last token."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][-1] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_loss_that_is_not_finite_names_its_step_and_samples_and_harms_nothing(chats, data, tmp_path):
    """The logit of a rare token is minus infinity: only steps that ask for it are skipped, the others are learned
    from."""
    model = with_row(chats / "llama", tmp_path / "model", 0.1)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 10.0  # positive behind every norm, so that the product has one sign
    weights["lm_head.weight"][-1] = 0.0
    weights["lm_head.weight"][-1, 0] = -3e38
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert trainer.train(settings(data, model, tmp_path / "run", "checkpoint.keep=0")) == 0
    samples = TokenData([data], SEQ)
    rare = samples.meta["vocab_size"] - 1
    order = SampleOrder(len(samples), 0)
    batches = [[int(i) for i in order.take(step * BATCH, BATCH)] for step in range(STEPS)]
    bad = {
        step: sorted(batch) for step, batch in enumerate(batches, 1) if any(rare in samples.sample(i)[1] for i in batch)
    }
    records = metrics.read(tmp_path / "run" / "metrics.jsonl")
    steps = {r["step"]: r.get("skipped") for r in records if r["kind"] == "step"}
    assert bad and {step for step, why in steps.items() if why} == set(bad)
    for step, batch in bad.items():
        assert steps[step].startswith("the loss is ") and steps[step].endswith(f"in samples {batch[0]}, {batch[1]}")
        said = [r["message"] for r in records if r["kind"] == "event" and r["event"] == "skip" and r["step"] == step]
        assert said == [f"step {step} skipped: {steps[step]}"]
    saved = set(checkpoint.steps(tmp_path / "run"))
    assert saved == {step for step in range(1, STEPS + 1) if step == STEPS or step not in bad}  # none while in doubt
    for weights in (tmp_path / "run").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(weights).values())


def test_a_model_with_a_weight_that_is_not_finite_is_not_trained(chats, data, tmp_path):
    model = with_row(chats / "llama", tmp_path / "model", random.choice([math.nan, math.inf]))
    with pytest.raises(
        UserError, match=r"model: the weight .*embed_tokens.weight is not finite; training cannot"
    ) as raised:
        trainer.train(settings(data, model, tmp_path / "run"))
    one_line(raised.value)
    assert not checkpoint.steps(tmp_path / "run")


@pytest.mark.parametrize("zero", [1, 3])
def test_destroyed_weights_are_not_saved_over_good_ones(chats, data, tmp_path, monkeypatch, zero):
    """A step of a rate that is beyond all numbers: finite gradients, weights that are not."""
    monkeypatch.setattr(trainer, "learning_rate", lambda optim, step, total: 1e-3 if step < 3 else 1e39)
    model, output = with_row(chats / "llama", tmp_path / "model", 0.1), tmp_path / "run"
    with pytest.raises(
        UserError, match=r"training stopped at step 4, not saved: the weight .* is not finite"
    ) as raised:
        trainer.train(settings(data, model, output, "checkpoint.keep=1", f"zero={zero}"))
    assert one_line(raised.value).endswith(f"the last good checkpoint is {checkpoint.folder(output, 3)}")
    assert checkpoint.steps(output) == [3]
    monkeypatch.undo()
    assert trainer.train(settings(data, model, output, "checkpoint.keep=1", f"zero={zero}")) == 0
    assert checkpoint.steps(output) == [STEPS]


@pytest.fixture
def copied(data, tmp_path) -> Path:
    for path in (data, index_path(data)):
        shutil.copy2(path, tmp_path / path.name)
    return tmp_path / data.name


def test_tokens_that_changed_behind_their_index_are_refused(chats, copied, tmp_path):
    """A run that is continued on a token file of the same size and other content."""
    arguments = (copied, chats / "llama", tmp_path / "run")
    assert trainer.train(settings(*arguments, "train.max_steps=1")) == 0
    before, time = copied.read_bytes(), index_path(copied).stat().st_mtime_ns
    tokens = np.frombuffer(before, "<u2").copy()
    tokens[random.randrange(len(tokens))] ^= 1
    copied.write_bytes(tokens.tobytes())
    with pytest.raises(UserError, match=r"train.bin: checksum differs from the index; run launch/prepare.py tokens"):
        trainer.train(settings(*arguments))
    copied.write_bytes(before)  # the same bytes, another time: they are read, and are right
    assert copied.stat().st_mtime_ns > time
    assert trainer.train(settings(*arguments)) == 0


def test_a_flipped_bit_that_no_time_tells_of_is_named_where_it_matters(chats, copied, tmp_path):
    index_time = index_path(copied).stat().st_mtime_ns
    tokens = np.frombuffer(copied.read_bytes(), "<u2").copy()
    place = random.randrange(len(tokens) - 1)
    tokens[place] ^= 1 << 15
    copied.write_bytes(tokens.tobytes())
    os.utime(copied, ns=(index_time, index_time))
    says = rf"train.bin: damaged: token {place} is {tokens[place]}, outside the vocabulary"
    with pytest.raises(UserError, match=says) as raised:
        trainer.train(settings(copied, chats / "llama", tmp_path / "run", "train.max_steps=8"))
    one_line(raised.value)
    with pytest.raises(UserError, match=says):
        trainer.train(settings(copied, chats / "llama", tmp_path / "other", f"data.val={copied}"))
