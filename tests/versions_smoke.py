"""One short run of everything with the libraries that are installed: `make test-newest` and `make test-oldest`.

Not part of the suite, which tests all of this in depth with the locked versions. Each mode trains two steps on two
processes; evaluation, generation, scoring, export, a resume after a kill; the kernels compile.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from gated import convert, save
from jobs import ROOT, TRACKED, VOCAB, hold, launch, start, until
from safetensors.torch import load_file

from ds_llm.checkpoint import folder as checkpoint
from ds_llm.compat import deepspeed, lm_eval, optuna, transformers, triton
from ds_llm.compat import torch as private_torch
from ds_llm.models import accelerate
from ds_llm.pretrained.loading import load_model
from ds_llm.tracking import metrics_file as metrics

PAIRS = [
    {"prompt": "reverse red blue", "chosen": "blue red", "rejected": "red blue"},
    {"prompt": "reverse cat dog sun", "chosen": "sun dog cat", "rejected": "cat"},
] * 8


def command(script: str, *arguments) -> subprocess.CompletedProcess:
    found = subprocess.run(
        [sys.executable, f"launch/{script}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-3000:]
    return found


def train(output, *keys: str, steps: int = 2, **env):
    """Train on two processes; the records of its steps."""
    arguments = [f"output={output}", f"train.max_steps={steps}", "train.batch_size=2", "train.dtype=bf16", *TRACKED]
    job = launch("forked", [*arguments, "checkpoint.every_epoch=false", *keys], **env)
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-3000:]
    found = [r for r in metrics.read(output / "metrics.jsonl") if r["kind"] == "step"]
    assert len(found) == steps and all(math.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in found)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("smoke")


@pytest.fixture(scope="module")
def pretrained(folder, corpus):
    """A run of our decoder with experts, under ZeRO-2."""
    data = [f"data.train={corpus / 'train.bin'}", f"data.val={corpus / 'val.bin'}"]
    size = ["model.dim=32", "model.n_layers=2", "model.n_heads=4", "model.max_seq_len=32"]
    experts = ["model.use_moe=true", "model.n_routed_experts=4", "model.moe_intermediate_size=16"]
    train(folder / "pretrain", "mode=pretrain", "zero=2", *data, *size, *experts)
    return folder / "pretrain"


def test_all_listed_names_exist():
    for module in (deepspeed, lm_eval, optuna, private_torch, transformers, triton):
        for name in module.NAMES:
            assert getattr(module, name) is not None


def test_kernels_enter_models_of_transformers(chats):
    dense, sparse = accelerate(load_model(chats / "llama")), accelerate(load_model(chats / "qwen3_moe"))
    assert (dense.rope, sparse.rope, sparse.routers, sparse.experts) == (2, 2, 2, 2)


@pytest.mark.parametrize("model, zero", [("llama", 3), ("qwen3_moe", 2)])
def test_sft(model, zero, chats, folder):
    data = [f"data.train={chats / 'train.jsonl'}", f"data.val={chats / 'val.jsonl'}", "data.seq_len=96"]
    keys = ["train.kernels=true", "train.activation_checkpointing=true"]
    train(folder / f"sft-{model}", "mode=sft", f"zero={zero}", f"model.path={chats / model}", *data, *keys)
    assert load_model(folder / f"sft-{model}").config.vocab_size


def test_lora_and_export(chats, folder):
    data = [f"data.train={chats / 'train.jsonl'}", "data.seq_len=96", f"model.path={chats / 'llama'}"]
    train(folder / "lora", "mode=sft", "zero=3", "lora.enabled=true", "lora.r=4", "optim.lr=1e-2", *data)
    found = command("export", "--model", folder / "lora", "--out", folder / "merged")
    assert "wrote" in found.stdout
    before, after = load_file(chats / "llama" / "model.safetensors"), load_file(folder / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[n].float(), after[n].float()) for n in before)


def test_dpo(chats, folder):
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    train(folder / "dpo", "mode=dpo", "zero=2", f"model.path={chats / 'decoder'}", f"data.train={folder}/pairs.jsonl")


def test_sparse(corpus, pretrained, folder):
    data = ["--data", corpus / "train.bin", "--sequences", 4, "--length", 32]
    command("prune", "--model", pretrained, "--out", folder / "pruned", "--method", "wanda", "--density", 0.5, *data)
    keys = [f"model.path={folder / 'pruned'}", f"data.train={corpus / 'train.bin'}", "data.seq_len=32"]
    train(folder / "sparse", "mode=sparse", "zero=2", "sparse.density=0.5", *keys)


def test_router(corpus, folder):
    base = convert(save("olmoe", folder / "olmoe", corpus / "tokenizer", VOCAB), folder / "gated")
    keys = [f"model.path={base}", f"data.train={corpus / 'train.bin'}", "data.seq_len=32"]
    train(folder / "router", "mode=router", "zero=3", *keys)


def test_evaluate_generate_and_score(corpus, pretrained, chats, folder):
    arguments = ["--model", pretrained, "--data", corpus / "val.bin", "--window", 32, "--json", folder / "ppl.json"]
    command("evaluate", "perplexity", *arguments)
    assert 1 < json.loads((folder / "ppl.json").read_text())["value"] < 10 * VOCAB
    said = [
        command("generate", "--model", pretrained, "--prompt", "w1 w2 w3", "--greedy", "--max-new-tokens", 8, *cache)
        for cache in ([], ["--no-use-cache"])
    ]
    assert said[0].stdout.strip() and said[0].stdout == said[1].stdout
    scores = folder / "scores.jsonl"
    job = start(
        "forked",
        ["--model", str(chats / "llama"), "--data", str(chats / "val.jsonl"), "--out", str(scores)],
        script=ROOT / "launch" / "score.py",
    )
    out, err = job.communicate(timeout=900)
    assert job.returncode == 0, out + err
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    assert len(rows) == 20 and all(0 < row["entropy"] < math.log(1000) for row in rows)


def test_killed_and_resumed_is_the_same_run(corpus, folder):
    size = ["model.dim=32", "model.n_layers=2", "model.n_heads=4", "model.max_seq_len=32", "zero=2", "mode=pretrain"]
    keys = [*size, f"data.train={corpus / 'train.bin'}", "checkpoint.every_steps=1", "checkpoint.keep=9"]
    train(folder / "straight", *keys, steps=4)
    killed = folder / "killed"
    arguments = [f"output={killed}", "train.max_steps=4", "train.batch_size=2", "train.dtype=bf16", *TRACKED]
    job = start("forked", [*arguments, "checkpoint.every_epoch=false", *keys], **hold(folder, "step", 2))
    until(lambda: 2 in checkpoint.steps(killed), job)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    train(killed, *keys, steps=4)
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (folder / "straight", killed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_kernels_compile():
    arguments = ["-m", "ds_llm.kernels.compile_check", "--dtype", "bf16", "--capability", "90", "--jobs", "2"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=env)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
