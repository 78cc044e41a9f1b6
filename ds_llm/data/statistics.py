"""Statistics of the preparation: lengths of documents and dropped rows, as JSON, table and picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ds_llm.data.resumable import AppendFile
from ds_llm.data.rows import REASONS, Reject, to_json
from ds_llm.progress import console

BINS_PER_DECADE = 10


def summary(lengths: np.ndarray) -> dict:
    """Count, total, mean, quantiles and histogram of document lengths (int [documents]).

    Histogram: `counts[i]` documents have a length of at least `edges[i]` and less than `edges[i + 1]`; edges grow by a
    tenth of a decade.
    """
    if not len(lengths):
        return {"count": 0, "total": 0}
    quantiles = np.quantile(lengths, [0.05, 0.5, 0.95, 0.99], method="lower")
    top = int(np.ceil(np.log10(int(lengths.max()) + 1) * BINS_PER_DECADE))
    edges = np.unique(np.ceil(10 ** (np.arange(0, top + 1) / BINS_PER_DECADE)).astype(np.int64))
    if edges[-1] <= lengths.max():
        edges = np.append(edges, lengths.max() + 1)
    counts = np.histogram(lengths, edges)[0]
    first, last = np.flatnonzero(counts)[[0, -1]]
    return {
        "count": len(lengths),
        "total": int(lengths.sum()),
        "mean": round(float(lengths.mean()), 2),
        "min": int(lengths.min()),
        **dict(zip(("p5", "median", "p95", "p99"), map(int, quantiles), strict=True)),
        "max": int(lengths.max()),
        "histogram": {"edges": edges[first : last + 2].tolist(), "counts": counts[first : last + 1].tolist()},
    }


def picture(lengths: dict, unit: str, title: str) -> bytes:
    """PNG of a length histogram, from what `summary` returned."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edges, counts = np.array(lengths["histogram"]["edges"]), lengths["histogram"]["counts"]
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color="#3b6ea5", edgecolor="white", linewidth=0.5)
    for name, style in (("median", "-"), ("p95", "--")):
        axes.axvline(lengths[name], color="#b5452c", linestyle=style, label=f"{name} {lengths[name]:,}")
    axes.set_xscale("log")
    axes.set_xlabel(f"document length ({unit})")
    axes.set_ylabel("documents")
    axes.set_title(f"{title}: {lengths['count']:,} documents, {lengths['total']:,} {unit}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def write_rejects(out: AppendFile, file: Path, rejects: list[Reject], state: dict) -> None:
    """Append rows `{"file", "line", "reason", "detail"}`; count the reasons in `state["dropped"]`."""
    for reject in rejects:
        state["dropped"][reject.reason] = state["dropped"].get(reject.reason, 0) + 1
        if "example" not in state:
            state["example"] = f"{file} line {reject.number}: {reject.reason}, {reject.detail}"
        row = {"file": str(file), "line": reject.number, "reason": reject.reason, "detail": reject.detail}
        out.write(to_json(row) + b"\n")


def nothing_left(state: dict) -> str:
    """The reason why the input gave no document."""
    if not state["records"]:
        return "the input holds no rows"
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in state["dropped"].items())
    return f"none of the {state['records']:,} rows holds a usable text ({reasons}); the first: {state['example']}"


def show(title: str, statistics: dict, rejects: Path) -> None:
    """Print the table of what was read, kept and dropped, with the reasons."""
    from rich.table import Table

    read, dropped = statistics["records"], statistics["dropped"]
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    table.add_column("why")
    table.add_row("read", f"{read:,}", "", "")
    for reason, meaning in REASONS.items():
        if dropped.get(reason):
            table.add_row(f"dropped: {reason}", f"{dropped[reason]:,}", f"{dropped[reason] / read:.2%}", meaning)
    kept = read - sum(dropped.values())
    table.add_row("kept", f"{kept:,}", f"{kept / max(read, 1):.2%}", "")
    console.print(table)
    if dropped:
        console.print(f"Dropped rows with file and line: {rejects}")


def show_lengths(lengths: dict, unit: str) -> None:
    """Print one line on document lengths, from what `summary` returned."""
    console.print(
        f"Document length in {unit}: mean {lengths['mean']:,.0f}, median {lengths['median']:,}, "
        f"95% {lengths['p95']:,}, longest {lengths['max']:,}; {lengths['total']:,} in all"
    )
