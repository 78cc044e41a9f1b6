"""The sparse mode: runs, continues and exports a pruned model without losing a zero, and refuses what would."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from chats import adapted, randomise
from jobs import ROOT, VOCAB, launch
from multirank.test_resume import same_state
from transformers import AutoTokenizer

from ds_llm.config import deepspeed as deepspeed_config
from ds_llm.config import run as config
from ds_llm.convert.export import export
from ds_llm.errors import ConfigError, UserError
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM
from ds_llm.models.head import attach_loss_head
from ds_llm.pretrained import lora as adapters
from ds_llm.pretrained.loading import load_model
from ds_llm.sparsity import compact_checkpoint
from ds_llm.sparsity.masks import load_masks, save_masks
from ds_llm.sparsity.targets import prunable
from ds_llm.tracking import metrics_file as metrics
from ds_llm.train import trainer
from ds_llm.train.modes import sft, sparse

STEPS = 6


@pytest.fixture(scope="module")
def pruned(corpus, tmp_path_factory) -> Path:
    """Folder of a small decoder with experts of which every layer keeps 30 %, with masks and tokenizer."""
    folder = tmp_path_factory.mktemp("pruned")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"use_moe": True, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = DecoderForCausalLM(DecoderConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes, **experts))
    masks = {}
    for target in prunable(model):
        scores = torch.rand_like(target.weight)
        masks[target.name] = scores <= scores.flatten().kthvalue(round(0.3 * scores.numel())).values
        target.weight.mul_(masks[target.name])
    model.save_pretrained(folder)
    save_masks(folder, masks, {})
    AutoTokenizer.from_pretrained(corpus / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(corpus, tmp_path_factory) -> Path:
    """Texts to evaluate on, of the corpus' words."""
    path = tmp_path_factory.mktemp("text") / "val.jsonl"
    rows = [{"text": " ".join(f"w{(start + i) % 57}" for i in range(30))} for start in range(0, 50, 7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"no": "text"}]))
    return path


@pytest.fixture(scope="module")
def pruned_llama(chats, tmp_path_factory) -> Path:
    """Folder of the chat model `llama` with half of its layers' weights, and masks."""
    folder = tmp_path_factory.mktemp("chat") / "llama"
    model, masks = load_model(chats / "llama"), {}
    for target in prunable(model):
        masks[target.name] = torch.rand_like(target.weight) < 0.5
        target.weight.mul_(masks[target.name])
    model.save_pretrained(folder)
    save_masks(folder, masks, {})
    AutoTokenizer.from_pretrained(chats / "llama").save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(corpus, pruned, text) -> list[str]:
    return [
        "mode=sparse",
        f"model.path={pruned}",
        f"data.train={corpus / 'train.bin'}",
        f"data.val={text}",
        "data.seq_len=32",
        "train.batch_size=2",
        "train.dtype=fp32",
        f"train.max_steps={STEPS}",
        "optim.lr=1e-2",
        "checkpoint.every_steps=2",
        "checkpoint.keep=0",
        "tracking.log_every=1",
        "tracking.tensorboard=false",
    ]


def run(arguments: list[str], output: Path) -> list[dict]:
    assert trainer.train(config.load(None, [*arguments, f"output={output}"])) == 0
    return metrics.read(output / "metrics.jsonl")


def test_a_continued_run_ends_bitwise_alike_and_keeps_every_zero(arguments, pruned, tmp_path):
    arguments = [*arguments, "zero=2", "ema.enabled=true", "sparse.density=0.3"]
    arguments += ["sparse.samples=10", "sparse.scale_lr=true"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"w{i}", "completion": f"w{i + 1} w{i + 2}"}) + "\n" for i in range(9))
    )
    arguments += ["eval.generation_metrics=[rouge]", f"eval.generation_data={rows}", "eval.max_new_tokens=3"]
    whole = run(arguments, tmp_path / "whole")
    output, early = tmp_path / "continued", "checkpoints/step-00000002"
    shutil.copytree(tmp_path / "whole" / early, output / early)
    resumed = metrics.deterministic(run(arguments, output))
    assert resumed == [r for r in metrics.deterministic(whole) if r["step"] > 2]
    last = f"checkpoints/step-{STEPS:08d}"
    same_state(tmp_path / "whole" / last, output / last)
    steps, evals = ([r for r in whole if r["kind"] == kind] for kind in ("step", "eval"))
    assert max(r["lr"] for r in steps) == pytest.approx(1e-2 * math.sqrt(2))
    assert [r["step"] for r in evals] == [0, 5, STEPS]  # an epoch of 10 samples is 5 steps of 2
    assert evals[-1]["perplexity"] < evals[0]["perplexity"] == evals[-1]["baseline_perplexity"]
    assert all(r["generated"] == 9 and 0 <= r["rouge1"] <= 100 for r in evals)
    masks = load_masks(pruned)
    for path in sorted(output.glob("checkpoints/*/model")):
        table = json.loads((path / "sparsity.json").read_text())
        assert {row["name"]: row["kept"] for row in table} == {name: mask.nnz for name, mask in masks.items()}
    assert not (output / "model" / "model.safetensors").exists()
    trained = load_model(output)
    found = export(output, tmp_path / "out")
    assert found.rounding == 0
    written = dict(load_model(tmp_path / "out").named_parameters())
    for name, p in trained.named_parameters():
        assert torch.equal(written[name], p)
        if name in masks:
            assert not p[~masks[name].to_dense()].any()
    assert {n: m.nnz for n, m in load_masks(tmp_path / "out").items()} == {n: m.nnz for n, m in masks.items()}
    export(tmp_path / "out", tmp_path / "compact", compact=True)
    assert all(torch.equal(p, written[n]) for n, p in load_model(tmp_path / "compact").named_parameters())
    page = (output / "report.html").read_text()
    assert "Kept weights" in page and "experts.down_proj" in page and "Share of weights that are not 0" in page


@pytest.mark.parametrize(
    "overrides", [["lora.enabled=true", "lora.targets=[q_proj]", "lora.r=2"], ["sparse.train_dense=false"]]
)
def test_a_run_that_trains_a_part_continues_and_leaves_the_rest(overrides, arguments, pruned, tmp_path):
    arguments = [*arguments, *overrides, "zero=3", "train.max_steps=4", "eval.before=false", "tracking.report=false"]
    whole = run([*arguments, "ema.enabled=true"], tmp_path / "whole")
    shutil.copytree(tmp_path / "whole/checkpoints/step-00000002", tmp_path / "on/checkpoints/step-00000002")
    resumed = run([*arguments, "ema.enabled=true"], tmp_path / "on")
    assert metrics.deterministic(resumed) == [r for r in metrics.deterministic(whole) if r["step"] > 2]
    same_state(tmp_path / "whole/checkpoints/step-00000004", tmp_path / "on/checkpoints/step-00000004")
    before, after, masks = dict(load_model(pruned).named_parameters()), load_model(tmp_path / "on"), load_masks(pruned)
    for name, p in after.named_parameters():
        trained = name in masks and ("q_proj" in name or "lora.r=2" not in overrides)
        assert torch.equal(p, before[name]) != trained, name
        assert name not in masks or not p[~masks[name].to_dense()].any()


def built(arguments: list[str], *overrides: str):
    settings = config.load(None, [*arguments, *overrides])
    data = sparse.check(settings)
    return sparse.build(settings, data), data


def test_masks_come_from_zeros_a_file_or_a_compact_folder(arguments, pruned, tmp_path):
    job, data = built(arguments)
    expected = job.info["sparse"]["kept"]
    plain = tmp_path / "plain"
    export(pruned, plain)
    (plain / "masks.safetensors").rename(tmp_path / "elsewhere.safetensors")
    from_zeros, _ = built(arguments, f"model.path={plain}")
    from_file, other = built(arguments, f"model.path={plain}", f"sparse.masks={tmp_path / 'elsewhere.safetensors'}")
    export(pruned, tmp_path / "compact", compact=True)
    assert compact_checkpoint.is_compact(tmp_path / "compact")
    from_compact, _ = built(arguments, f"model.path={tmp_path / 'compact'}")
    for one in (from_zeros, from_file, from_compact):
        assert one.info["sparse"]["kept"] == expected
    assert other.fingerprint["masks"] and "masks" not in data.fingerprint
    with pytest.raises(ConfigError, match=r"sparse.density: 0.5 is asked for, the 12 masks keep 0."):
        built(arguments, f"model.path={plain}", "sparse.density=0.5")


def test_what_is_trained(arguments):
    def trained(*overrides):
        model = built(arguments, *overrides)[0].model
        return {n for n, p in model.named_parameters() if p.requires_grad}

    everything, kept = trained(), trained("sparse.train_dense=false")
    assert kept == {n for n in everything if n.endswith("_values")} and len(kept) == 12 and len(everything) > 12
    adapters = trained("lora.enabled=true", "lora.r=2", "lora.targets=[q_proj,v_proj]")
    assert len(adapters) == 8 and all("lora_" in n and ("q_proj" in n or "v_proj" in n) for n in adapters)


def test_the_rate_grows_with_the_root_of_the_global_batch(arguments, monkeypatch):
    for overrides, processes, batch in (
        ([], 1, 2),
        (["train.accumulation_steps=3"], 1, 6),
        (["train.batch_size=5"], 4, 20),
    ):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        assert built(arguments, *overrides, "sparse.scale_lr=true")[0].lr_factor == math.sqrt(batch)
        assert built(arguments, *overrides)[0].lr_factor == 1


def test_stops_early_at_the_best_perplexity(arguments, tmp_path):
    arguments += ["zero=0", "train.max_steps=40", "optim.lr=1e-30", "optim.weight_decay=0", "eval.every_steps=1"]
    arguments += ["eval.early_stopping=true", "eval.patience=2", "checkpoint.every_steps=0", "tracking.report=false"]
    records = run(arguments, tmp_path / "run")
    assert [r["step"] for r in records if r["kind"] == "step"][-1] == 3  # nothing changes: the best is the first
    assert records[-1]["best_step"] == records[-1]["model_step"] == 1


def test_an_epoch_of_a_fixed_number_of_samples(arguments):
    job, data = built(arguments, "sparse.samples=7")
    assert len(job.samples) == 7 and len(set(job.samples.chosen)) == 7
    more = len(data.inner.train) + 5
    job, _ = built(arguments, f"sparse.samples={more}")
    assert len(job.samples) == more and set(job.samples.chosen) == set(range(len(data.inner.train)))
    expected = data.inner.train.batch(job.samples.chosen[[3, more - 1]])
    assert all(torch.equal(t, expected[n]) for n, t in job.samples.batch([3, more - 1]).items())


def presets() -> dict[str, list[str]]:
    """The overrides of docs/sparse.md by card."""
    page = (ROOT / "docs" / "sparse.md").read_text()
    rows = re.findall(r"^\| (up to 4 GB|6 to 8 GB|12 GB and more) \| (.*) \|$", page, re.MULTILINE)
    return {card: re.search("`(.*)`", cell)[1].split() for card, cell in rows}


RECIPE = ROOT / "ds_configs" / "recipes" / "sparse.yaml"


@pytest.mark.parametrize("card", ["up to 4 GB", "6 to 8 GB", "12 GB and more"])
def test_the_settings_for_each_card_are_possible(card, pruned, corpus, text):
    keys = [f"model.path={pruned}", f"data.train={corpus / 'train.bin'}", f"data.val={text}", "sparse.density=0.3"]
    settings = config.load(str(RECIPE), [*presets()[card], *keys, "data.seq_len=32", "eval.token_length=32"])
    job = sparse.build(settings, sparse.check(settings))
    built_json = deepspeed_config.build(settings, 1)
    assert settings.train.dtype == "bf16" and built_json["bf16"]["enabled"]
    offloaded = built_json["zero_optimization"].get("offload_optimizer", {}).get("device")
    frozen = [n for n, p in job.model.named_parameters() if not p.requires_grad]
    assert (offloaded == "cpu") == bool(frozen) == (card == "up to 4 GB")


def test_the_smallest_card_is_trained_for_on_two_processes(pruned, corpus, text, tmp_path):
    """The recipe as it is but for the sizes: bf16, ZeRO-2 with the optimizer on the CPU, recomputed layers."""
    sizes = [f"model.path={pruned}", f"data.train={corpus / 'train.bin'}", f"data.val={text}", "sparse.density=0.3"]
    sizes += ["data.seq_len=32", "eval.token_length=32", "eval.max_windows=2", "sparse.samples=8", "train.epochs=1"]
    sizes += ["train.accumulation_steps=2", "optim.lr=1e-2", "tracking.report=false", f"output={tmp_path / 'run'}"]
    done = launch("forked", ["--config", str(RECIPE), *presets()["up to 4 GB"], *sizes])
    assert done.returncode == 0, done.stdout + done.stderr
    evals = [r for r in metrics.read(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "eval"]
    assert [r["step"] for r in evals] == [0, 2] and evals[-1]["perplexity"] < evals[0]["perplexity"]
    before, after = (dict(load_model(path, "bf16").named_parameters()) for path in (pruned, tmp_path / "run"))
    masks = load_masks(pruned)
    for name, p in after.items():
        if name in masks:
            assert not p[~masks[name].to_dense()].any() and not torch.equal(p, before[name])
        else:
            assert torch.equal(p, before[name])


def test_processes_that_share_rows_train_the_same(arguments, tmp_path):
    kinds = {"alone": [], "rows": ["parallel.sequence=2", "train.batch_size=4"]}
    for name, keys in kinds.items():
        done = launch("forked", [*arguments, "zero=1", *keys, f"output={tmp_path / name}", "tracking.report=false"])
        assert done.returncode == 0, done.stdout + done.stderr
    alone, rows = (metrics.read(tmp_path / name / "metrics.jsonl") for name in kinds)
    for kind, name in (("step", "loss"), ("step", "grad_norm"), ("eval", "perplexity")):
        wanted, found = ([r[name] for r in records if r["kind"] == kind] for records in (alone, rows))
        assert found == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["model.path=null"], "model.path: sparse fine-tunes a pruned model"),
        (["sparse.density=0.2"], "sparse.density: 0.2 is asked for, the 12 masks keep 0."),
        (["sparse.masks=/nowhere"], "/nowhere/masks.safetensors: no such mask file"),
        (["lora.enabled=true", "lora.dora=true"], "lora.dora: True is not possible on a sparse model"),
        (["lora.enabled=true", "lora.dropout=0.1"], "lora.dropout: 0.1 is not possible"),
        (["sparse.scale_lr=true", "deepspeed={scheduler: {type: WarmupLR, params: {}}}"], "sparse.scale_lr"),
        (["eval.token_length=500"], "eval.token_length: 500 tokens are more than the model's 64 positions"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(arguments, overrides, says):
    with pytest.raises((ConfigError, UserError)) as raised:
        sparse.check(config.load(None, [*arguments, *overrides]))
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_dense_model_is_refused(arguments, corpus, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    DecoderForCausalLM(DecoderConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(corpus / "tokenizer").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no pruned layer; prune it first"):
        built(arguments, f"model.path={tmp_path}")


def test_conversations_are_trained_on_as_in_fine_tuning(arguments, chats, pruned_llama, monkeypatch, tmp_path):
    monkeypatch.setenv("DS_LLM_CACHE", str(tmp_path))
    rows = [f"data.{name}={chats / f'{name}.jsonl'}" for name in ("train", "val")]
    job, data = built([*arguments, f"model.path={pruned_llama}", "data.seq_len=96", *rows])
    assert data.kind is sft and job.info["sparse"]["layers"] == 14
    batch = job.samples.batch([0])
    loss = job.objective(**batch).loss_sum
    dense = sft.SupervisedLoss(attach_loss_head(load_model(pruned_llama, "fp32")))
    torch.testing.assert_close(loss, dense(**batch).loss_sum)


def test_an_adapter_that_would_fill_the_zeros_is_not_merged(pruned_llama, tmp_path):
    model = adapted(pruned_llama.parent, pruned_llama.name)
    adapters.save_adapter(model, randomise(model), tmp_path / "adapter")
    with pytest.raises(UserError, match="would fill the zeros of a pruned model"):
        export(tmp_path / "adapter", tmp_path / "out")
