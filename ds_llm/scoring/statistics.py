"""Counts of a scoring run: printed before the model is loaded, and saved as JSON for the report."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ds_llm.errors import UserError
from ds_llm.progress import console
from ds_llm.scoring.batches import Plan
from ds_llm.scoring.index import Index
from ds_llm.scoring.merge import Output

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def describe_rows(index: Index) -> None:
    """Print how much of the rows will be scored. Raises `UserError` where it is nothing."""
    c = index.counts
    bad = sum(c["errors"].values())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in c["errors"].items())
    if not c["rows"]:
        raise UserError("the data holds no row")
    if bad == c["rows"]:
        raise UserError(f"none of the {bad:,} rows can be scored ({reasons}); the first: {c['example']}")
    console.print(f"{c['rows']:,} rows, {c['tokens']:,} tokens, of which {c['scored_tokens']:,} count")
    if bad:
        console.print(f"  {bad:,} rows cannot be scored: {reasons}; the first: {c['example']}")
    if c["truncated"]:
        console.print(
            f"  {c['truncated']:,} rows are longer than max_length and cut; {c['lost_tokens']:,} tokens that would "
            "count are lost"
        )
    if c["without_answer"]:
        console.print(f"  {c['without_answer']:,} rows have no token that counts")


def collect(output: Output, index: Index, plan: Plan, errors: Counter, more: dict) -> dict:
    """Counts, the distribution of each column of numbers in `rows.parquet`, and the entries of `more`."""
    counts = index.counts
    with pq.ParquetFile(output.rows_path) as file:
        numbers = [
            f.name for f in file.schema_arrow if f.name in output.fields.values() and pa.types.is_floating(f.type)
        ]
        columns = {name: _distribution(file.read([name])[name]) for name in numbers}
    return {
        "out": str(output.out),
        "rows": counts["rows"],
        "scored": counts["rows"] - sum(counts["errors"].values()),
        "errors": dict(errors),
        **{name: counts[name] for name in ("truncated", "lost_tokens", "without_answer", "tokens", "scored_tokens")},
        "batches": len(plan),
        "padding": round(float(plan.padding), 6),
        "columns": columns,
        **more,
    }


def _distribution(column: pa.ChunkedArray) -> dict:
    values = column.drop_null().to_numpy()
    if not len(values):
        return {"count": 0}
    return {
        "count": len(values),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
        "quantiles": dict(zip(map(str, QUANTILES), np.quantile(values, QUANTILES).tolist(), strict=True)),
    }
