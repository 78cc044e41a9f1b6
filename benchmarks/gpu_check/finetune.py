"""Supervised fine-tuning and preference optimisation beside TRL, by `benchmarks.trainers`."""

from __future__ import annotations

import json

from benchmarks import trainers
from benchmarks.gpu_check import inputs
from benchmarks.gpu_check.report import Place, Report

# of SmolLM2-135M, and tiny
GPU_MODEL = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip
TOY_MODEL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GPU = {"dtype": "bf16", "seq-len": 1024, "batch-size": 8, "steps": 12, "repeats": 1}
TOY = {"dtype": "fp32", "seq-len": 128, "batch-size": 2, "steps": 3, "repeats": 1}


def sft(report: Report, place: Place) -> None:
    compare("sft", report, place)


def dpo(report: Report, place: Place) -> None:
    compare("dpo", report, place)


def compare(mode: str, report: Report, place: Place) -> None:
    """Tokens per second and memory of one ZeRO stage of ours, TRL's and TRL's without DeepSpeed."""
    model = inputs.chat_model(place.scratch, TOY_MODEL if place.toy else GPU_MODEL)
    rows = inputs.chat_rows(place.scratch, rows=60 if place.toy else trainers.ROWS, words=12 if place.toy else 150)
    found = place.scratch / f"{mode}-trainers.json"
    options = TOY if place.toy else GPU
    arguments = ["--model", str(model), "--rows", str(rows), "--mode", mode, "--zero", "0", "--json", str(found)]
    trainers.main([*arguments, *(part for name, value in options.items() for part in (f"--{name}", str(value)))])
    result = json.loads(found.read_text())
    names = {"tokens_per_clock_s": "tokens_per_s", "peak_bytes": "peak_gb", "loss_difference": "loss_difference"}
    rates = {}
    for row in result["table"]:
        name = " ".join(row["name"].split())
        cells = {new: row[old] / (1e9 if old == "peak_bytes" else 1) for old, new in names.items()}
        rates[name] = row["tokens_per_clock_s"]
        report.row("trainers", trainer=name, **cells, ours_to_this=row["ours_to_this_tokens_per_clock_s"])
    ours = next(rate for name, rate in rates.items() if " ours " in name)
    others = [rate for name, rate in rates.items() if " trl " in name]
    report.figures(
        tokens_per_step=result["tokens_per_step"][mode],
        tokens_per_s=ours,
        trl="measured" if others else "not installed",
        ours_to_fastest_trl=ours / max(others) if others else None,
    )
