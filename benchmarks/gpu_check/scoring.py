"""Scoring rows of 512 tokens by a model of Qwen2.5-3B's shape: `benchmarks.scoring`, and the command's own loop."""

from __future__ import annotations

import gc
import json

import torch

from benchmarks import scoring as benchmark
from benchmarks.gpu_check import inputs
from benchmarks.gpu_check.report import Place, Report

GPU_MODEL = {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
             "num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True,
             "max_position_embeddings": 2048}  # fmt: skip
TOY_MODEL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
OLD_ROWS_PER_S = 2.8  # of the program that this one replaces, as its users measured it at this model and length


def scoring(report: Report, place: Place) -> None:
    """Rows per second of ours, of batch 1, of padded batches and of the floor; then of `launch/score.py`'s loop."""
    length, rows = (48, 24) if place.toy else (512, 256)
    model = inputs.scoring_model(place.scratch, TOY_MODEL if place.toy else GPU_MODEL)
    path = inputs.texts(place.scratch, 4 * rows, length)
    found = place.scratch / "scoring.json"
    arguments = ["--model", str(model), "--texts", str(path), "--documents", str(rows), "--rounds", "1"]
    arguments += ["--dtype", "bf16", "--json", str(found)] + (["--tokens", "256"] if place.toy else [])
    benchmark.main(arguments)
    result = json.loads(found.read_text())
    rates = {name: rows / entry["seconds"] for name, entry in result["contestants"].items()}
    for name, entry in result["contestants"].items():
        cells = {"rows_per_s": rates[name], "tokens_per_s": entry["tokens_per_second"]}
        cells |= {"of_floor": entry["share_of_floor_seconds"], "peak_over_model_mib": entry["peak_mib"]}
        report.row("contestants", contestant=name, **cells, differs=entry.get("largest_relative_difference"))
    report.figures(
        tokens_per_row=result["tokens"] / rows,
        rows_per_s=rates["ours"],
        ours_to_batch_1=rates["ours"] / rates["batch 1"],
        of_floor=result["contestants"]["ours"]["share_of_floor_seconds"],
        old_program_rows_per_s=OLD_ROWS_PER_S,
    )
    gc.collect()  # the benchmark's model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    torch.set_grad_enabled(True)
    whole_command(report, place, model, path)


def whole_command(report: Report, place: Place, model, path) -> None:
    """The loop of `launch/score.py` over all texts, as it finds its own batch size."""
    from ds_llm.scoring import options, run

    flags = {"model": str(model), "data": [str(path)], "out": str(place.scratch / "scores.jsonl"), "report": False}
    told = run.score(options.load(flags=flags | {"metric": ["entropy", "logprob"], "dtype": "bf16"}))
    report.figures(
        command_rows=told["rows"],
        command_rows_with_error=sum(told["errors"].values()),
        command_rows_per_s=told["rows_per_second"],
        command_tokens_per_batch=told["tokens_per_batch"],
        command_seconds=told["seconds"],
    )
