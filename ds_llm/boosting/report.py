"""Held-out losses of all models of the boosting recipe, side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ds_llm import hardware
from ds_llm.errors import UserError
from ds_llm.progress import console, duration

AGAINST = "plain"  # differences are to this model where it is there, else to sft


def build(output: Path, models: list[str], stages: list[str]) -> dict:
    """Compare the models of `OUTPUT/compare/NAME.jsonl` (`logprob` of the held-out rows).

    loss: nats per token that counts. difference: to the model `against`, with the standard error of the mean over rows
    (rows weighted by their tokens). Rows that one of the models could not score are left out for all, and counted.
    """
    tables = {name: _read(output / "compare" / f"{name}.jsonl.d" / "rows.parquet") for name in models}
    against = AGAINST if AGAINST in models else "sft"
    sound = np.logical_and.reduce([np.isfinite(loss) & (tokens > 0) for loss, tokens in tables.values()])
    if not sound.any():
        raise UserError(f"{output / 'compare'}: no held-out row has a loss under every model")
    tokens = tables[against][1][sound]
    rows = []
    for name in models:
        loss, change = tables[name][0][sound], tables[name][0][sound] - tables[against][0][sound]
        mean, shift = float((loss * tokens).sum() / tokens.sum()), float((change * tokens).sum() / tokens.sum())
        error = math.sqrt(float((tokens**2 * (change - shift) ** 2).sum())) / float(tokens.sum())
        rows.append({
            "model": name,
            "loss": mean,
            "perplexity": math.exp(mean),
            "difference": shift,
            "standard_error": error,
            "steps": _steps(output, name),
        })  # fmt: skip
    seconds = {name: _seconds(output, name) for name in stages}
    return {
        "against": against,
        "rows": int(sound.sum()),
        "rows_left_out": int((~sound).sum()),
        "tokens": int(tokens.sum()),
        "models": rows,
        "seconds": {name: value for name, value in seconds.items() if value is not None},
        "environment": hardware.environment(),
    }


def show(report: dict) -> None:
    """Print the comparison as a table."""
    from rich.table import Table

    title = f"{report['rows']:,} held-out rows, {report['tokens']:,} tokens that count"
    if report["rows_left_out"]:
        title += f"; {report['rows_left_out']:,} rows left out"
    console.print(title)
    table = Table("model", "steps", "loss", "perplexity", f"loss - {report['against']}", "standard error", box=None)
    for row in report["models"]:
        figures = (f"{row['loss']:.4f}", f"{row['perplexity']:.3f}", f"{row['difference']:+.4f}")
        table.add_row(row["model"], str(row["steps"]), *figures, f"{row['standard_error']:.4f}")
    console.print(table)
    took = ", ".join(f"{name} {duration(value)}" for name, value in report["seconds"].items())
    console.print(f"stages took: {took}")


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Loss in nats per token, NaN where there is none, and tokens that count, of each row; float64."""
    table = pq.read_table(path, columns=["logprob", "tokens"])
    loss, tokens = (table[name].to_numpy().astype(np.float64) for name in ("logprob", "tokens"))
    return -loss, np.nan_to_num(tokens)


def _steps(output: Path, name: str) -> int:
    """Optimizer steps behind a model, those of the models it began with included."""
    from ds_llm.checkpoint import folder as checkpoint

    def own(run: str) -> int:
        found = checkpoint.steps(output / run)
        return found[0] if found else 0

    before = own("sft") + own("weighted")
    return {
        "base": 0,
        "sft": own("sft"),
        "weighted": before,
        "vote": before,
        "plain": own("plain"),
    }.get(name, before + own("fused"))  # fmt: skip


def _seconds(output: Path, stage: str) -> float | None:
    stamp = output / ".stages" / f"{stage}.json"
    return json.loads(stamp.read_text())["seconds"] if stamp.is_file() else None
