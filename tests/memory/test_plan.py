"""The plan against real models and against the memory that real trainings take."""

import json
import random
import re

import jobs
import pytest
from models.architectures import tiny

from ds_llm.config.deepspeed import adopt
from ds_llm.config.run import load
from ds_llm.errors import ConfigError
from ds_llm.memory import presets as plan_presets
from ds_llm.memory.model import outline
from ds_llm.memory.plan import Planner, Setting, card_bytes
from ds_llm.pretrained.loading import load_tokenizer
from ds_llm.sparsity.targets import prunable
from ds_llm.train.start_model import start_model

MEASURED = ["model.dim=384", "model.n_layers=8", "model.n_heads=6", "model.vocab_size=16000", "model.max_seq_len=256"]


def measured(*overrides: str) -> int:
    """Bytes by which rank 0 of a training on two processes grew."""
    job = jobs.start("forked", [*MEASURED, *overrides], script=jobs.ROOT / "tests" / "plan_worker.py")
    out, err = job.communicate(timeout=jobs.PATIENCE)
    assert job.returncode == 0, err[-3000:]
    return json.loads(next(line for line in out.splitlines() if line.startswith("{")))["growth"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["zero=0", "train.dtype=fp32", "train.batch_size=3", "ema.enabled=true"],
        ["zero=2", "train.dtype=fp32", "train.batch_size=4", "train.activation_checkpointing=true"],
        ["zero=3", "train.dtype=bf16", "train.batch_size=2"],
    ],
)
def test_the_plan_is_within_15_percent_of_what_a_training_takes(overrides):
    config = load(None, [*MEASURED, *overrides])
    adopt(config, 2)
    planner = Planner(config, 2, touched=True)
    assert 18e6 < planner.outline.parameters < 50e6
    wanted = planner.estimate(Setting(config.zero, False, config.train.activation_checkpointing)).total
    assert wanted == pytest.approx(measured(*overrides), rel=0.15)


@pytest.mark.parametrize("extra", [["lora.enabled=true", "lora.r=3"], ["model.freeze=[model.layers.0]"], []])
def test_what_is_trained_is_what_the_run_would_train(chats, extra):
    config = load(None, ["mode=sft", f"model.path={chats / 'llama'}", "train.dtype=bf16", *extra])
    model = start_model(config, load_tokenizer(chats / "llama"))
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    found = outline(config)
    assert found.trained == sum(n for n, learns in sizes if learns)
    assert found.frozen == sum(n for n, learns in sizes if not learns)
    planner = Planner(config, 1, touched=True)
    plain, again = (planner.estimate(Setting(0, False, again)).activations for again in (False, True))
    assert plain > again > 8 * 128 * 32 * 2 * 2  # each layer's input at least: 8 rows of 128 tokens, width 32, bf16
    sparse = load(None, ["mode=sparse", f"model.path={chats / 'llama'}", "sparse.density=0.25"])
    if not extra:
        whole = sum(target.weight.numel() for target in prunable(model))
        assert outline(sparse).trained == found.parameters - whole + round(whole / 4)
        with pytest.raises(ConfigError, match="density: say which share"):
            outline(load(None, ["mode=sparse", f"model.path={chats / 'llama'}"]))


def test_sharding_offload_and_recomputation_save_what_they_should():
    config = load(None, [*MEASURED, "train.dtype=bf16", "train.batch_size=4", "model.use_moe=true", "ema.enabled=true"])
    planner = Planner(config, 8, touched=True)
    found = {(s, o, c): planner.estimate(Setting(s, o, c)) for s, o, c in
             [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (2, 1, 0), (3, 1, 0), (3, 1, 1)]}  # fmt: skip
    weights = planner.outline.parameters
    none, whole = found[0, 0, 0], found[3, 0, 0]
    assert (none.weights, none.optimizer, none.average) == (2 * weights, 12 * weights, 4 * weights)
    assert whole.weights == pytest.approx(weights / 4, rel=1e-5) and whole.optimizer == pytest.approx(12 * weights / 8)
    assert found[2, 1, 0].optimizer == found[3, 1, 0].weights == 0
    assert found[3, 1, 0].host == pytest.approx((2 + 12 + 4 + 4) * weights / 8, rel=1e-5)
    assert found[3, 1, 1].activations < 0.6 * found[3, 1, 0].activations
    double = planner.with_rows(8).estimate(Setting(3, False, False)).activations
    assert 1.5 * whole.activations < double < 2.1 * whole.activations


def test_the_presets_of_the_page_are_the_planners():
    """Of one model, another one each time: each takes some seconds."""
    page = (jobs.ROOT / "docs" / "memory.md").read_text()
    for cells in plan_presets.rows(random.choice(list(plan_presets.MODELS))):
        assert plan_presets.line(cells) in page


def test_the_command(tmp_path):
    shape = [*MEASURED, "train.batch_size=8"]
    calls = [
        (["--plan", "--world", "8", "--card", "4GB", *shape], 0, ""),
        (["--plan", *MEASURED[0:1]], 2, "model.vocab_size: say it, or name data.tokenizer"),
        (["--plan", "--card", "big", *shape], 2, "--card: 'big' is not a size such as 24GB"),
        (["--plan", "--world", "0", *shape], 2, "--world: 0 must be at least 1"),
        (["--world", "2", *shape], 2, "--world and --card belong to --plan"),
    ]
    running = [jobs.start("forked-1", arguments) for arguments, _, _ in calls]
    for (_, code, text), job in zip(calls, running, strict=True):
        out, err = job.communicate(timeout=jobs.PATIENCE)
        assert job.returncode == code and text in err, (out, err)
        if code:
            assert err.startswith("error: ") and err.count("\n") == 1
        else:
            assert "20.3M parameters; bf16, 8 processes, micro-batch of 8 x 256 tokens" in out
            assert all(f"ZeRO {stage}" in out for stage in range(4))
            advice = re.search(r"for 8 x 4 GB: (zero=\d train.batch_size=\d.*)  \(([\d.]+) GB\)", out)
            assert advice and float(advice[2]) < 4 * 1.074 * 0.92


def test_cards_are_read_in_the_ways_they_are_written():
    assert card_bytes("24GB") == card_bytes("24") == card_bytes("24 GiB") == 24 * 2**30
    with pytest.raises(ConfigError):
        card_bytes("0GB")


def test_what_processes_share_is_counted_once_in_a_group():
    sizes = [*MEASURED, "model.n_kv_heads=2", "train.dtype=bf16", "train.batch_size=4"]

    def planner(*keys: str) -> Planner:
        return Planner(load(None, [*sizes, *keys]), 8, touched=True)

    moe = ["model.use_moe=true", "model.n_routed_experts=8"]
    whole, shared = planner(*moe), planner(*moe, "parallel.expert=4")
    assert shared.outline.parameters == whole.outline.parameters
    assert shared.outline.shared == sum(p.numel() for p in whole._meta().parameters() if p.dim() == 3) / 4
    assert whole.outline.trained - shared.outline.trained == 3 * shared.outline.shared
    for stage in (1, 3):  # ZeRO shares what is left among fewer processes
        mine, other = (p.estimate(Setting(stage)) for p in (shared, whole))
        assert mine.optimizer == pytest.approx(other.optimizer, rel=1e-4)
    assert shared.estimate(Setting(0)).optimizer < 0.5 * whole.estimate(Setting(0)).optimizer
    alone, sliced = planner(), planner("parallel.tensor=2")
    assert sliced.outline.parameters == alone.outline.parameters
    vocabulary = 16000 * 384  # whole on every process, as are the norms
    kept = sliced.outline.trained - vocabulary
    assert kept == pytest.approx((alone.outline.trained - vocabulary) / 2, rel=1e-3)
    assert 0.4 < sliced.estimate(Setting(0)).activations / alone.estimate(Setting(0)).activations < 0.95
    rows = planner("parallel.sequence=4")
    assert rows.outline.trained == alone.outline.trained
    assert 0.2 < rows.estimate(Setting(2)).activations / alone.estimate(Setting(2)).activations < 0.5


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gemma2", "qwen3_next"])
def test_other_architectures_are_planned(name, tmp_path):
    tiny(name).config.save_pretrained(tmp_path)
    keys = ["data.seq_len=64", "model.vocab_size=500", "train.batch_size=2"]
    config = load(None, ["mode=pretrain", f"model.config={tmp_path}", *keys])
    adopt(config, 1)
    planner = Planner(config, 1, touched=True)
    found = planner.estimate(Setting(0, False, False))
    assert found.activations > 2 * 64 * planner.outline.config.get_text_config().hidden_size * 2
    assert planner.outline.parameters == planner.outline.trained > 0
