"""Preferences that a tiny model learns in a few steps, and plain torch in float64 on them, one sequence at a time."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from ds_llm.config import run as config
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM
from ds_llm.tracking import metrics_file as metrics
from ds_llm.train import trainer

COLOURS = ["red", "green", "blue", "black", "white", "brown"]
LR, BATCH, STEPS = 1e-3, 16, 3  # of the runs that plain torch repeats


def pair(number: int) -> dict:
    draw = random.Random(number)
    right, wrong = draw.sample(COLOURS, 2)
    prompt = f"{draw.choice(['say', 'name', 'give'])} {right}{draw.choice([' please', '', ' now'])}"
    return {"prompt": prompt, "chosen": f"{right} it is", "rejected": wrong}


def write(path: Path, rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def make_models(folder: Path, rows: list[dict]) -> None:
    """`model`, `other` (other weights) and `moe` in a folder, with a tokenizer that knows the words of the rows."""
    from transformers import AutoTokenizer

    from ds_llm.data.tokenizer import train_tokenizer

    write(folder / "text.jsonl", [{"text": " ".join(row.values())} for row in rows])
    train_tokenizer([folder / "text.jsonl"], folder / "tokenizer", vocab_size=320)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    decoder(folder / "model", tokenizer, 0)
    decoder(folder / "other", tokenizer, 1)
    decoder(folder / "moe", tokenizer, 2, use_moe="true", n_routed_experts=4)


def usual(world: Path, output: Path, mode: str) -> list[str]:
    """Arguments of a run of the mode on `train.jsonl` and `val.jsonl`."""
    return [
        f"mode={mode}",
        f"model.path={world / 'model'}",
        f"data.train={world / 'train.jsonl'}",
        f"data.val={world / 'val.jsonl'}",
        f"output={output}",
        "train.batch_size=4",
        "train.dtype=fp32",
        f"optim.lr={LR}",
        "zero=0",
        "tracking.report=false",
        "tracking.tensorboard=false",
    ]


def run(*arguments) -> list[dict]:
    """The records of a run in this process."""
    c = config.load(None, list(arguments))
    assert trainer.train(c) == 0
    return metrics.read(f"{c.output}/metrics.jsonl")


def of_kind(records, kind: str) -> list[dict]:
    return [r for r in records if r["kind"] == kind]


def steps(overrides, output, **options) -> list[str]:
    """Arguments of `STEPS` steps, on `BATCH` samples each with 4 processes or micro-steps of 4."""
    usual = {"train.max_steps": STEPS, "optim.schedule": "constant", "optim.warmup_steps": 0, "output": output}
    return [*overrides, *(f"{k}={v}" for k, v in (usual | options).items())]


def answer_log_probs(model, tokenizer, row: dict, side: str) -> tuple[torch.Tensor, int]:
    """Summed log-probability of an answer from whole logits, and its tokens."""
    prompt = [{"role": "user", "content": row["prompt"]}]
    head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": row[side]}], tokenize=False)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    begin = len(tokenizer(head, add_special_tokens=False)["input_ids"])
    end = next(i for i in range(begin, len(ids)) if ids[i] == tokenizer.eos_token_id) + 1
    logits = model(ids[None]).logits[0].log_softmax(-1)
    found = logits[torch.arange(begin - 1, end - 1), ids[begin:end]]
    return found.sum(), end - begin


def in_float64(world: Path, name: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(world / name, dtype=torch.float64)


def adamw(model) -> torch.optim.Optimizer:
    """The optimizer of a run with the usual options."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))


def update(model, optimizer) -> float:
    """An optimizer step with clipped gradients; returns their norm."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def same(output, expected: list[dict], weights: dict) -> None:
    """The steps and the exported model of a run are those worked out by hand."""
    from safetensors.torch import load_file

    found = of_kind(metrics.read(output / "metrics.jsonl"), "step")
    for record, figures in zip(found, expected, strict=True):
        for name, value in figures.items():
            tolerance = {"loss": {"rel": 1e-5}, "grad_norm": {"rel": 2e-3}}.get(name, {"abs": 1e-5, "rel": 1e-5})
            assert record[name] == pytest.approx(value, **tolerance), (record["step"], name)
    for name, tensor in load_file(output / "model" / "model.safetensors").items():
        assert torch.allclose(tensor.double(), weights[name], atol=2e-4), name
