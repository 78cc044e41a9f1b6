"""`metrics.jsonl`, the record of a run: one JSON object per line, written at once and whole after any interruption.

Every line has `kind` (step, eval, event or summary) and `time` (Unix seconds). Fields that depend on the clock or the
machine are listed in `MEASURED`. All other fields of step and eval records are a function of the configuration and the
data: an interrupted and resumed run has the same ones bit for bit as an undisturbed run.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

from ds_llm.errors import UserError

FILE = "metrics.jsonl"
MEASURED = frozenset({"time", "tokens_per_s", "step_time", "eta", "mfu", "memory_gb", "seconds"})


class MetricsFile:
    """Appends records to `path`, each flushed to the operating system as one line.

    Opening it at `start_step` drops step and eval records after that step and any summary, so that a continued run has
    every step once. Events stay. At `start_step` 0 the file begins empty. One rename replaces the old file, so that a
    kill while opening loses nothing.

    Floats are written in full precision (`repr`); NaN and infinities, which JSON lacks, become null.
    """

    def __init__(self, path: Path, start_step: int = 0):
        self.path = Path(path)
        kept = _until(read(self.path), start_step) if start_step else []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._rewrite(kept)
        except OSError as error:
            raise UserError(f"{self.path}: cannot write the metrics ({error.strerror})") from None
        self._evaluated = {r["step"] for r in kept if r["kind"] == "eval"}

    def write(self, kind: str, record: dict) -> dict:
        """Append one record and return it as written. A second evaluation at the same step replaces the first."""
        record = jsonable({"kind": kind, **record, "time": time.time()})
        try:
            if kind == "eval":
                if record["step"] in self._evaluated:
                    self._file.close()
                    same = ("eval", record["step"])
                    self._rewrite([r for r in read(self.path) if (r["kind"], r.get("step")) != same])
                self._evaluated.add(record["step"])
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot write the metrics ({error.strerror})") from None
        return record

    def sync(self) -> None:
        """Flush the file to the disk, so that even after a power cut no step before a checkpoint is missing."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _rewrite(self, records: list[dict]) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(map(_line, records))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (held open for the whole run)


def read(path: Path) -> list[dict]:
    """The records of a metrics file in their order; none if there is no file.

    A last line cut short by a kill is left out. Any other unreadable line raises `UserError` with its number.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip(b" \r\0"):  # a power cut can leave zero bytes behind the last whole line
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "kind" not in record:
                raise ValueError
        except ValueError:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is not a metrics record; remove the line or the file") from None
        records.append(record)
    return records


def deterministic(records: list[dict]) -> list[dict]:
    """Step and eval records without the `MEASURED` fields; two equal runs have the same ones bit for bit."""
    kinds = ("step", "eval")
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in records if r["kind"] in kinds]


def jsonable(value):
    """`value` with tensors and arrays as lists or numbers and non-finite floats as None."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _until(records: list[dict], step: int) -> list[dict]:
    """Records that stay when a run continues after `step`: the last of each step and evaluation, and all events."""
    kept = {}
    for number, record in enumerate(records):
        if record["kind"] in ("step", "eval"):
            if record["step"] <= step:
                kept[record["kind"], record["step"]] = record
        elif record["kind"] != "summary":
            kept[record["kind"], number] = record
    return list(kept.values())


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
