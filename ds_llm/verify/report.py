"""Rows of the table of proofs: makes them of checks, prints them, sums them up."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ds_llm.errors import UserError, first_line
from ds_llm.progress import console

HOLDS, REFUSED, BROKEN = "holds", "refused", "broken"
STYLES = {HOLDS: "green", REFUSED: "yellow", BROKEN: "bold red"}
WIDTH = 38  # of the names of proofs


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    difference: between the two ways of computing; up to `limit` it is rounding. detail: what the row says. shown:
    tokens and labels (shifted) of a sample and their tokenizer, for printing.
    """

    detail: str = ""
    difference: float = 0.0
    limit: float = 0.0
    shown: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Row:
    """A proof. status: holds, refused or broken. detail: by how much, or why."""

    name: str
    status: str
    detail: str
    difference: float | None = None
    seconds: float = 0.0
    shown: tuple[Any, ...] | None = dataclasses.field(default=None, repr=False)

    def to_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("name", "status", "detail", "difference", "seconds")}


def prove(name: str, check: Callable[[], Finding]) -> Row:
    """Run a check and return its row. A `UserError` means refused, any other exception broken."""
    start = time.monotonic()

    def row(status: str, detail: str, difference: float | None = None, shown: tuple | None = None) -> Row:
        return Row(name, status, detail, difference, round(time.monotonic() - start, 2), shown)

    try:
        found = check()
    except UserError as error:
        return row(REFUSED, first_line(error))
    except Exception as error:  # of transformers, DeepSpeed or here: what it means is that this does not work
        return row(BROKEN, f"{type(error).__name__}: {first_line(error)}")
    if not found.difference <= found.limit:
        by = f"differs by {found.difference:.1e}, where rounding may change {found.limit:.0e}"
        return row(BROKEN, ": ".join(filter(None, (by, found.detail))), found.difference, found.shown)
    return row(HOLDS, found.detail, found.difference, found.shown)


def show(row: Row) -> None:
    """Print a row as a line."""
    console.print(f"{row.status:<8}", style=STYLES[row.status], end="")
    by = f"to {row.difference:.0e}" if row.status == HOLDS and row.difference else ""
    console.print(f"{row.name:<{WIDTH}} {'; '.join(filter(None, (row.detail, by)))}")


def summary(rows: list[Row]) -> str:
    """One line: how many hold, are refused, are broken."""
    counts = {status: sum(row.status == status for row in rows) for status in STYLES}
    return f"{counts[HOLDS]} hold, {counts[REFUSED]} refused, {counts[BROKEN]} broken"
