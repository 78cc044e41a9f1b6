"""Prints prepared samples, decoded and with marked trained tokens, and counts of the rows."""

from __future__ import annotations

import numpy as np
from rich.table import Table
from rich.text import Text

from ds_llm.config import modes
from ds_llm.config.modes import MODES
from ds_llm.data.supervised import REASONS
from ds_llm.data.tokens import IGNORE
from ds_llm.errors import UserError
from ds_llm.progress import console

STYLES = {True: "bold green", False: "dim"}
BRACKETS = ("⟦", "⟧")


def show_run(config, count: int) -> None:
    """Print `count` of the samples that a run of this configuration trains on, evenly spread, and their counts."""
    if not MODES[config.mode].shown:
        raise UserError(f"mode={config.mode}: only samples of {modes.names('shown')} are shown")
    from ds_llm.train.modes import module  # imports torch

    mode = module(config.mode)
    data = mode.check(config)
    samples = mode.shown(data)
    for i in _spread(samples.count, count):
        for title, ids, labels in samples.parts(i):
            show_sample(title, ids, labels, data.tokenizer)
    if isinstance(samples.report, dict):
        show_counts(samples.report)
    else:
        console.print(samples.report)


def _spread(size: int, count: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, size - 1, min(count, size)).round()})


def show_sample(title: str, ids: np.ndarray, labels: np.ndarray, tokenizer) -> None:
    """Print a sample: ids int64 [n], labels int64 [n] (shifted); what is trained is bold green, the rest dim.

    Where the output has no colours, trained tokens stand in ⟦ ⟧.
    """
    trained = np.append(False, labels[:-1] != IGNORE)
    text = Text()
    for part in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(trained)) + 1):
        piece = tokenizer.decode(ids[part].tolist(), clean_up_tokenization_spaces=False)
        bracketed = trained[part[0]] and not console.color_system
        text.append(piece.join(BRACKETS) if bracketed else piece, STYLES[bool(trained[part[0]])])
    console.print(f"── {title}: {len(ids):,} tokens, {trained.sum():,} trained", style="bold")
    console.print(text)


def show_counts(report: dict) -> None:
    """Print the counts of `Supervised.report` as tables."""
    table = Table(title="What is trained on", title_justify="left", box=None, pad_edge=False)
    table.add_column("source", overflow="fold")
    for name in ("rows", "dropped", "truncated", "samples", "tokens", "trained"):
        table.add_column(name, justify="right", no_wrap=True)

    def add(title: str, counts: dict, samples: int) -> None:
        share = counts["supervised_tokens"] / max(counts["tokens"], 1)
        figures = (counts["rows"], sum(counts["dropped"].values()), counts["truncated"], samples, counts["tokens"])
        table.add_row(Text(title), *(f"{figure:,}" for figure in figures), f"{share:.1%}")

    for source in report["sources"]:
        add(f"{source['name']} ({source['format']})", source, source["samples"])
        if source["drawn"] != source["samples"]:
            table.add_row(f"  drawn, weight {source['weight']:g}", "", "", "", f"{source['drawn']:,}")
    if len(report["sources"]) > 1:
        add("all that is drawn", report, report["samples"])
    console.print(table)
    if report["dropped"]:
        reasons = Table(box=None, pad_edge=False)
        for name, justify in (("dropped because", "left"), ("rows", "right"), ("meaning", "left")):
            reasons.add_column(name, justify=justify)
        for reason, count in sorted(report["dropped"].items(), key=lambda item: -item[1]):
            reasons.add_row(reason, f"{count:,}", REASONS[reason])
        console.print(reasons)
        console.print(f"Dropped rows with file and line: {report['rejects']}")
    lengths = report["lengths"]
    console.print(
        f"Sample length in tokens: mean {lengths['mean']:,.0f}, median {lengths['median']:,}, 95% {lengths['p95']:,}, "
        f"longest {lengths['max']:,}; {report['supervised_tokens']:,} of {report['tokens']:,} tokens are trained"
    )
