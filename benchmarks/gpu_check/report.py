"""What a step hands over while it runs: figures and tables, on the disk after each of them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

OK, FAILED, TIMED_OUT, NOT_INSTALLED = "ok", "failed", "timed out", "not installed"


class NotInstalled(Exception):
    """Nothing of what a step measures is installed; the message says what."""


@dataclass(frozen=True)
class Place:
    """Where a step runs. scratch: folder that all steps of a call share; toy: sizes for a CPU; wheels: those given."""

    scratch: Path
    toy: bool
    wheels: Path | None = None


class Report:
    """Figures by name, and tables: a list of rows by title. Units are in the names. Every change is written to `path`
    in one rename, so that what a step found stays when it is killed."""

    def __init__(self, path: Path):
        self.path = path
        self.content: dict = {"figures": {}, "tables": {}}

    def figures(self, **named: object) -> None:
        self.content["figures"] |= named
        self.save()

    def row(self, table: str, **cells: object) -> None:
        self.content["tables"].setdefault(table, []).append(cells)
        self.save()

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content))
        os.replace(partial, self.path)
