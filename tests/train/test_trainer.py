"""The loop in one process: when it evaluates, saves, skips, stops, and what it refuses."""

import json
import shutil
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest
import torch
from devices import FP16_HERE, in_fp16_here
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_llm.checkpoint import folder as checkpoint
from ds_llm.config import run as config
from ds_llm.data.order import MixtureOrder, SampleOrder
from ds_llm.data.tokens import TokenData, TokenFile, TokenWriter
from ds_llm.distributed.interrupt import EXIT_CODE
from ds_llm.errors import ConfigError, UserError
from ds_llm.report.run import plots
from ds_llm.tracking import metrics_file as metrics
from ds_llm.train import trainer


@pytest.fixture(autouse=True)
def handlers():
    """The trainer takes over SIGTERM and SIGINT; give them back to pytest."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tiny, tmp_path):
    """run(*overrides) trains in this process; returns (exit code, output folder, records)."""

    def go(*overrides: str, output: Path = tmp_path / "run"):
        code = trainer.train(config.load(None, [*tiny, f"output={output}", "zero=0", *overrides]))
        return code, output, metrics.read(output / "metrics.jsonl")

    return go


def of_kind(records: list[dict], kind: str) -> list[dict]:
    return [r for r in records if r["kind"] == kind]


def saved(output: Path) -> list[int]:
    return sorted(checkpoint.steps(output))


def test_epochs_evaluations_and_checkpoints(run, corpus):
    code, output, records = run("train.epochs=2.5", "train.accumulation_steps=3", "checkpoint.keep=0")
    assert code == 0
    samples = len(TokenData([corpus / "train.bin"], 32))
    batch, steps = 12, of_kind(records, "step")
    assert [r["step"] for r in steps] == list(range(1, -(-5 * samples // 2 // batch) + 1))
    ends = [-(-k * samples // batch) for k in (1, 2)] + [len(steps)]
    assert [r["step"] for r in of_kind(records, "eval")] == [0, *ends]
    assert saved(output) == ends
    assert steps[-1]["samples"] == len(steps) * batch and steps[-1]["epoch"] == pytest.approx(2.5, abs=batch / samples)
    found = of_kind(records, "eval")
    assert found[-1]["perplexity"] < 0.9 * found[0]["perplexity"]
    assert found[-1]["trend_percent"] == pytest.approx(100 * (found[-1]["perplexity"] / found[0]["perplexity"] - 1))
    # every label of the samples the order names was learned from, and no other
    order, data, tokens = SampleOrder(samples, 0), TokenData([corpus / "train.bin"], 32), 0
    for step in range(3):
        labels = data.batch(order.take(step * batch, batch))["labels"]
        tokens += int((labels != -100).sum())
        assert steps[step]["tokens"] == tokens


def test_exports_the_best_model_with_averaged_weights(run, corpus, tmp_path):
    code, output, records = run(
        "train.max_steps=30", "ema.enabled=true", "eval.every_steps=10", "checkpoint.keep=1", "optim.schedule=constant"
    )
    assert code == 0
    best = min(of_kind(records, "eval")[1:], key=lambda r: r["perplexity"])
    assert json.loads((output / "model" / "config.json").read_text())["model_type"]
    model = AutoModelForCausalLM.from_pretrained(output / "model").eval()
    AutoTokenizer.from_pretrained(output / "model")
    stream = torch.from_numpy(TokenData([corpus / "val.bin"], 31).streams()[0].astype("int64"))
    losses = []
    for window in stream[: len(stream) // 32 * 32].view(-1, 32):
        with torch.no_grad():
            logits = model(window[None]).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]))
    assert torch.stack(losses).mean().exp().item() == pytest.approx(best["perplexity"], rel=1e-4)
    summary = of_kind(records, "summary")[0]
    assert summary["best_step"] == best["step"] == summary["model_step"]
    assert set(saved(output)) == {30, best["step"]}
    for name in ("config.yaml", "environment.json", "deepspeed.json"):
        assert (output / name).is_file()
    assert config.load(str(output / "config.yaml")).train.max_steps == 30


def test_stops_early_without_gain(run):
    code, output, records = run(
        "train.max_steps=40", "optim.lr=1e-30", "eval.every_steps=4", "eval.early_stopping=true", "eval.patience=2"
    )
    assert code == 0
    assert of_kind(records, "step")[-1]["step"] == 12  # best at 4 (nothing changes), then two without gain
    assert any(r["event"] == "stop" and "stopped early" in r["message"] for r in of_kind(records, "event"))
    assert saved(output)[-1] == 12


def test_a_diverging_run_ends_with_the_last_good_checkpoint(run, tmp_path):
    with pytest.raises(UserError) as raised:
        run("optim.lr=1e30", "optim.warmup_steps=0", "checkpoint.every_steps=1", "stability.max_bad_steps=3")
    output = tmp_path / "run"
    records = of_kind(metrics.read(output / "metrics.jsonl"), "step")
    skipped = [r["step"] for r in records if r.get("skipped")]
    assert skipped == [r["step"] for r in records[-3:]]
    named = Path(str(raised.value).split("the last good checkpoint is ")[1].split(". ")[0])
    assert named.is_dir() and named.name == f"step-{saved(output)[-1]:08d}"
    assert saved(output)[-1] <= skipped[-1]


def test_spikes_are_skipped_and_counted(run):
    code, _, records = run(
        "train.max_steps=20",
        "optim.lr=1e-30",  # the loss stays, so about half the steps lie above the median
        "stability.spike_factor=1.001",
        "stability.spike_window=4",
        "stability.max_bad_steps=20",
        "checkpoint.every_steps=0",
    )
    assert code == 0
    steps = of_kind(records, "step")
    recent = []
    for r in steps:
        expected = len(recent) == 4 and r["loss"] > 1.001 * statistics.median(recent)
        assert bool(r.get("skipped")) == expected, r
        if not expected:
            recent = [*recent, r["loss"]][-4:]
    assert 0 < of_kind(records, "summary")[0]["skipped_steps"] < 16


@in_fp16_here
def test_fp16_may_search_its_loss_scale_for_longer_than_bad_steps(run):
    scale = {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}
    code, _, records = run(
        "train.dtype=fp16", f"deepspeed={{fp16: {scale}}}".replace("'", "").replace("True", "true"),
        "train.max_steps=40", "stability.max_bad_steps=2", "eval.before=false",
    )  # fmt: skip
    assert code == 0
    skipped = [r["step"] for r in of_kind(records, "step") if r.get("skipped")]
    assert skipped[:3] == [1, 2, 3] and len(skipped) < 30


@pytest.mark.skipif(FP16_HERE, reason="this device has fp16, so nothing refuses it")
@pytest.mark.parametrize(
    "override, key",
    [("train.dtype=fp16", "train.dtype=fp16"), ("deepspeed={fp16: {enabled: true}}", "deepspeed: fp16.enabled")],
)
def test_fp16_without_a_device_for_it_is_refused_before_anything_is_read(run, override, key):
    with pytest.raises(ConfigError, match=rf"^{key}: .* no fp16 arithmetic on this .*; use bf16 or fp32$"):
        run(override, "data.train=nowhere.bin", "data.tokenizer=nowhere", "model.path=nowhere/at/all")


def test_an_optimizer_that_cannot_be_built_is_one_line(run):
    with pytest.raises(UserError, match="DeepSpeed cannot use this configuration: ") as raised:
        run("deepspeed={optimizer: {type: Lamb, params: {lr: 1e-3}}}")
    assert "\n" not in str(raised.value)


def test_sigint_saves_and_the_same_command_continues(run, tmp_path):
    def interrupt():
        while not any(r["kind"] == "step" for r in metrics.read(tmp_path / "run" / "metrics.jsonl")):
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    code, output, records = run("train.max_steps=100000", "eval.before=false")
    thread.join()
    assert code == EXIT_CODE == 75
    step = of_kind(records, "step")[-1]["step"]
    assert saved(output) == [step]
    code, _, records = run(f"train.max_steps={step + 2}", "eval.before=false")
    assert code == 0
    assert [r["step"] for r in of_kind(records, "step")] == list(range(1, step + 3))


def test_user_json_decides_where_it_names_a_value(run, tmp_path, capsys):
    source = tmp_path / "ds.json"
    source.write_text(
        json.dumps(
            {
                "train_batch_size": 16,
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_clipping": 0.25,
                "zero_optimization": {"stage": 1},
                "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": "auto", "weight_decay": "auto"}},
                "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_type": "linear"}},
            }
        )
    )
    code, output, records = run(f"deepspeed={source}", "train.max_steps=6")
    assert code == 0
    used = json.loads((output / "deepspeed.json").read_text())
    assert used["gradient_accumulation_steps"] == 4 and used["gradient_clipping"] == 0.25
    assert used["zero_optimization"]["stage"] == 1 and used["optimizer"]["params"]["betas"] == [0.9, 0.95]
    rates = [r["lr"] for r in of_kind(records, "step")]
    assert rates[-1] == pytest.approx(2e-4) and rates[0] < rates[1] < rates[2]  # its own scheduler warms up
    assert "zero_optimization.stage=1 of the DeepSpeed JSON replaces zero=0" in capsys.readouterr().out


def test_continuing_as_another_run_is_refused(run, corpus, tmp_path):
    run("train.max_steps=2")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    other = tmp_path / "other.bin"
    tokens = TokenData([corpus / "train.bin"], 32)
    with TokenWriter(
        other, **{k: tokens.meta[k] for k in ("vocab_size", "eos_token_id", "tokenizer_hash", "tokenizer")}
    ) as w:
        w.append(tokens.streams()[0][:400], [400])
    for overrides, text in (
        (["optim.lr=5e-3"], "optim.lr: the run in"),
        (["model.dim=64"], "model.dim: the run in"),
        ([f"data.train={other}"], "data.train: the run in"),
        (["resume=never"], "use resume=auto or another folder"),
        ([f"resume={tmp_path / 'nowhere'}"], "no such checkpoint folder"),
        ([f"resume={tmp_path / 'run'}"], "is a run, not a checkpoint"),
    ):
        with pytest.raises(UserError, match=text):
            run("train.max_steps=2", *overrides)
    (corpus / "train.bin").rename(corpus / "aside.bin")
    (corpus / "train.idx").rename(corpus / "aside.idx")
    try:
        for suffix in (".bin", ".idx"):  # another file under the old name
            (corpus / f"train{suffix}").write_bytes(other.with_suffix(suffix).read_bytes())
        with pytest.raises(UserError, match="not what the run in"):
            run("train.max_steps=2")
    finally:
        for suffix in (".bin", ".idx"):
            (corpus / f"aside{suffix}").replace(corpus / f"train{suffix}")
    changed = [p for p, content in before.items() if p.read_bytes() != content]
    assert not changed


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["data.train=[]"], "data.train: name the token files"),
        (["data.train=nowhere.bin"], "nowhere.bin: no such token file"),
        (["data.seq_len=100"], "longer than model.max_seq_len"),
        (["data.tokenizer=nowhere"], "nowhere"),
        (["data.train=docs"], "docs: is a folder"),
        (["model.path=nowhere/at/all"], "nowhere/at/all"),
        (["model.vocab_size=10"], "model.vocab_size: 10 is less"),
        (["eval.token_length=64"], "eval.token_length: 64 tokens are more"),
        ([f"eval.prompts=[{'w1 ' * 40}]"], "40 tokens, the model 32 positions"),
        (["deepspeed=nowhere.json"], "nowhere.json: no such file"),
        (["data.seq_len=9000", "model.max_seq_len=9000"], "are not one sample"),
        (["output=/proc/nothing"], "output: /proc/nothing: cannot be written"),
    ],
)
def test_mistakes_are_found_before_a_model_is_built(run, monkeypatch, overrides, text):
    def forbidden(*_):
        raise AssertionError("a model was built")

    monkeypatch.setattr("ds_llm.train.modes.pretrain.build", forbidden)
    with pytest.raises((UserError, ConfigError)) as raised:
        run(*overrides)
    assert text in str(raised.value) and "\n" not in str(raised.value)


def test_token_file_of_another_tokenizer_is_refused(run, corpus, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    tokenizer.add_tokens(["w999"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="tokenizer"):
        run(f"data.tokenizer={tmp_path / 'tokenizer'}")


def test_a_mixture_of_token_files_is_drawn_by_its_weights_and_evaluated_by_file(run, corpus, tmp_path, capsys):
    files = []
    for name, part in (("code", 1), ("prose", 2)):
        source = TokenFile(corpus / "train.bin")
        files.append(tmp_path / f"{name}.bin")
        meta = {key: source.meta[key] for key in ("vocab_size", "eos_token_id", "tokenizer_hash", "tokenizer")}
        half = len(source.boundaries) // 2
        documents = source.boundaries[:half] if part == 1 else source.boundaries[half - 1 :]
        with TokenWriter(files[-1], **meta) as writer:
            writer.append(source.tokens[documents[0] : documents[-1]], documents[1:] - documents[:-1])
    both = f"[{files[0]},{files[1]}]"
    keys = [f"data.train={both}", f"data.val={both}", "data.weights=[0.5,2]", "train.max_steps=2", "optim.lr=1e-9"]
    code, output, records = run(*keys)
    assert code == 0
    data = TokenData(files, 32)
    epoch = [round(0.5 * data.counts[0]), 2 * data.counts[1]]
    assert next(r for r in records if r.get("event") == "start")["samples"] == sum(epoch)
    printed = capsys.readouterr().out
    assert f"code.bin: an epoch takes {epoch[0]:,} of {data.counts[0]:,} samples" in printed
    order = MixtureOrder(data.counts, [0.5, 2], 0)
    steps, last = of_kind(records, "step"), of_kind(records, "eval")[-1]
    batch = steps[0]["samples"]
    assert steps[0]["tokens"] == int((data.batch(order.take(0, batch))["labels"] != -100).sum())
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    for file in files:
        tokens = torch.tensor(TokenFile(file).tokens.astype("int64"))
        windows = tokens[: len(tokens) // 32 * 32].view(-1, 32)
        with torch.no_grad():
            expected = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
        assert last[f"loss/{file.stem}"] == pytest.approx(statistics.fmean(expected), abs=1e-4)
    curves = next(p for p in plots(steps, of_kind(records, "eval")) if p.title == "Held-out loss by file")
    assert [line.label for line in curves.lines] == ["code", "prose"]


@pytest.mark.parametrize(
    "weights, text",
    [
        ("[1,1]", r"^data\.weights: 2 weights for 1 data\.train files; give one each$"),
        ("[-1]", r"^data\.weights: -1\.0 must be a number greater than 0$"),
        ("[0.00001]", r"^data\.weights: 1e-05 of the [\d,]+ samples of .*train\.bin draws none; raise it, or leave"),
    ],
)
def test_a_mixture_that_cannot_be_drawn_is_refused(run, weights, text):
    with pytest.raises(ConfigError, match=text):
        run(f"data.weights={weights}")


@pytest.mark.parametrize("stage", [0, 3])
def test_router_biases_follow_the_load_and_continue_bit_for_bit(run, tmp_path, stage):
    keys = ["model.use_moe=true", "model.n_routed_experts=4", "model.first_dense_layers=1", "model.n_layers=3"]
    keys += ["model.aux_loss_alpha=0", "model.router_bias_speed=0.01", "train.dtype=bf16", "train.max_steps=4"]
    keys += ["checkpoint.every_steps=2", "checkpoint.keep=0", f"zero={stage}", "eval.before=false"]
    code, output, records = run(*keys)
    assert code == 0
    loads = torch.tensor([r["expert_load"] for r in of_kind(records, "step")])  # [steps, layers with experts, E]
    assert loads.shape[1:] == (2, 4)
    expected = (0.01 * (loads.mean(-1, keepdim=True) - loads).sign()).sum(0)
    weights = load_file(output / "model" / "model.safetensors")
    for layer, bias in zip((1, 2), expected, strict=True):
        found = weights[f"model.layers.{layer}.mlp.e_score_correction_bias"]
        assert found.dtype == torch.float32  # steps of 0.01 would round away in bf16
        torch.testing.assert_close(found, bias)
    again = tmp_path / "again"
    shutil.copytree(output, again)
    for last in again.glob("checkpoints/step-*4"):
        shutil.rmtree(last)
    code, _, _ = run(*keys, output=again)
    assert code == 0
    repeated = load_file(again / "model" / "model.safetensors")
    assert repeated.keys() == weights.keys() and all(torch.equal(repeated[n], weights[n]) for n in weights)
