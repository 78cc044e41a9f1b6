"""The recipes that pretrain, run as they stand but for their size: what they ask for is what comes out."""

import math

import pytest
import torch
from jobs import ROOT
from transformers import AutoModelForCausalLM

from ds_llm import checkpoint, config, metrics, trainer

SMALL = [
    "model.dim=32",
    "model.n_layers=2",
    "model.max_seq_len=64",
    "model.moe_intermediate_size=16",
    "train.batch_size=2",
]


@pytest.mark.parametrize("name", ["demo", "pretrain"])
def test_pretraining(name, corpus, tmp_path):
    data = [f"data.train={corpus / 'train.bin'}", f"data.val={corpus / 'val.bin'}", f"output={tmp_path / 'run'}"]
    short = ["train.max_steps=2", "eval.max_windows=2", "eval.max_new_tokens=3"]
    settings = config.load(str(ROOT / "ds_configs" / "recipes" / f"{name}.yaml"), [*SMALL, *data, *short])
    assert trainer.train(settings) == 0
    records = metrics.read(tmp_path / "run" / "metrics.jsonl")
    steps, evals = ([r for r in records if r["kind"] == kind] for kind in ("step", "eval"))
    assert [r["step"] for r in steps] == [1, 2] and all(math.isfinite(r["loss"]) for r in steps)
    m = settings.model
    assert torch.tensor(steps[-1]["expert_load"]).shape == (m.n_layers, m.n_routed_experts)
    assert [r["step"] for r in evals] == [0, 2] and evals[-1]["samples"][0]["prompt"] == settings.eval.prompts[0]
    (step,) = checkpoint.steps(tmp_path / "run")
    assert step == 2 and list(checkpoint.folder(tmp_path / "run", 2).glob("ema_rank*.pt"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert (model.config.n_shared_experts, model.config.num_hidden_layers) == (m.n_shared_experts, m.n_layers)
    assert model(torch.tensor([[4, 5, 6]])).logits.isfinite().all()
    assert (tmp_path / "run" / "report.html").is_file()
