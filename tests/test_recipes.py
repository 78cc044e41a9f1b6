"""Recipes of single runs, as they stand but for their size: what they ask for is what comes out."""

import math

import pytest
import torch
from gated import convert, save
from jobs import ROOT, VOCAB
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ds_llm.checkpoint import folder as checkpoint
from ds_llm.config import run as config
from ds_llm.pretrained import partial
from ds_llm.pretrained.loading import load_model
from ds_llm.tracking import metrics_file as metrics
from ds_llm.train import trainer
from ds_llm.train.modes import router

SMALL = [
    "model.dim=32",
    "model.n_layers=2",
    "model.max_seq_len=64",
    "model.moe_intermediate_size=16",
    "train.batch_size=2",
]


def train(name: str, arguments: list[str], output) -> tuple[config.Config, list[dict], list[dict]]:
    """Two steps of a recipe: its configuration, the records of its steps and of its evaluations."""
    short = ["train.max_steps=2", "eval.max_windows=2", f"output={output}"]
    settings = config.load(str(ROOT / "ds_configs" / "recipes" / f"{name}.yaml"), [*short, *arguments])
    assert trainer.train(settings) == 0
    records = metrics.read(output / "metrics.jsonl")
    steps, evals = ([r for r in records if r["kind"] == kind] for kind in ("step", "eval"))
    assert [r["step"] for r in steps] == [1, 2] and all(math.isfinite(r["loss"]) for r in steps)
    return settings, steps, evals


@pytest.mark.parametrize("name", ["demo", "pretrain"])
def test_pretraining(name, corpus, tmp_path):
    data = [f"data.train={corpus / 'train.bin'}", f"data.val={corpus / 'val.bin'}", "eval.max_new_tokens=3"]
    settings, steps, evals = train(name, [*SMALL, *data], tmp_path / "run")
    m = settings.model
    assert torch.tensor(steps[-1]["expert_load"]).shape == (m.n_layers, m.n_routed_experts)
    assert [r["step"] for r in evals] == [0, 2] and evals[-1]["samples"][0]["prompt"] == settings.eval.prompts[0]
    (step,) = checkpoint.steps(tmp_path / "run")
    assert step == 2 and list(checkpoint.folder(tmp_path / "run", 2).glob("ema_rank*.pt"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert (model.config.n_shared_experts, model.config.num_hidden_layers) == (m.n_shared_experts, m.n_layers)
    assert model(torch.tensor([[4, 5, 6]])).logits.isfinite().all()
    assert (tmp_path / "run" / "report.html").is_file()


def test_stage_1_of_selection_trains_the_gates_alone(corpus, tmp_path):
    base = convert(save("decoder", tmp_path / "original", corpus / "tokenizer", VOCAB), tmp_path / "base")
    data = [f"data.train={corpus / 'train.bin'}", f"data.val={corpus / 'val.bin'}"]
    settings, steps, evals = train("select_stage1", [f"model.path={base}", *data], tmp_path / "run")
    of_evaluations, of_steps = router.figures(settings)  # what a sweep can compare
    assert set(of_evaluations) <= evals[-1].keys() and set(of_steps) <= steps[-1].keys()
    assert all(0 < r["gate_mean"] < 1 and r["quality_loss"] > 0 for r in [*steps, *evals])
    assert all(-1 <= r["loss_correlation"] <= 1 and 0 <= r["pair_accuracy"] <= 1 for r in evals) and evals
    trained, before = load_file(tmp_path / "run" / "model" / partial.WEIGHTS_FILE), load_model(base).state_dict()
    assert set(trained) == {name for name in before if "quality_gate" in name}
    after = load_model(tmp_path / "run").state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value) != (name in trained), name


def test_stage_3_of_selection_trains_adapters_of_all_linear_layers(chats, tmp_path):
    data = [
        "data.seq_len=96",
        f"model.path={chats / 'decoder'}",
        f"data.train={chats / 'train.jsonl'}",
        f"data.val={chats / 'val.jsonl'}",
    ]
    settings, _, evals = train("select_stage3", data, tmp_path / "run")
    assert [r["step"] for r in evals] == [0, 2] and all(math.isfinite(r["loss"]) for r in evals)
    found = PeftConfig.from_pretrained(tmp_path / "run" / "model")
    assert (found.r, found.lora_alpha) == (settings.lora.r, settings.lora.alpha) == (128, 256)
    weights = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    reached = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in weights}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= reached
    assert all(w.abs().sum() > 0 for w in weights.values())  # the second of each pair starts at zero
