"""The rows of a data set on disk, tokenised once and readable in any order with little memory.

| file | content |
| --- | --- |
| tokens.bin | uint32, the tokens of all rows one after the other; bit 31 marks a scored token |
| rows.bin | a `samples.ROW` per input row: `end` (in tokens.bin), `cost` (tokens through the model), `scored`, ... |
| errors.jsonl | `{"idx", "file", "line", "reason", "detail"}` of the rows that are not scored, in order |
| order.npy | uint32, the rows to score by falling cost, equal ones by their number |
| index.json | the key and the counts; written last |

An interrupted index continues behind the last batch of records on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from ds_llm.data.resumable import SAVE_SECONDS, AppendFile, dump, partial, write_atomically
from ds_llm.data.rows import to_json
from ds_llm.data.sources import Source
from ds_llm.data.supervised import MOST_WORKERS, PARALLEL_BYTES
from ds_llm.data.workers import available_cpus, ordered
from ds_llm.errors import UserError
from ds_llm.progress import progress
from ds_llm.scoring.metrics import Sample
from ds_llm.scoring.samples import ROW, SCORED, Block, decode, encoder

FILES = ("tokens.bin", "rows.bin", "errors.jsonl")
SORT_ROWS = 1 << 20  # rows that are sorted in memory at a time


class Index:
    """A finished index. rows: `ROW` [n]. order: the rows to score, by falling cost. Both are memory maps.

    counts: `rows`, `tokens` (through the model once each), `scored_tokens`, `truncated`, `lost_tokens` (scored ones
    cut away), `without_answer`, `errors` (by reason), `example` (the first bad row).
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.counts = json.loads((self.folder / "index.json").read_bytes())["counts"]
        self.rows = _map(self.folder / "rows.bin", ROW)
        self.order = np.load(self.folder / "order.npy", mmap_mode="r")
        self._tokens = _map(self.folder / "tokens.bin", "<u4")

    def samples(self, rows: np.ndarray) -> list[Sample]:
        """The samples of rows (int64 numbers) that are to be scored."""
        ends = self.rows["end"]
        starts = np.where(rows > 0, ends[rows - 1], 0)
        return [decode(self._tokens[a:b]) for a, b in zip(starts.tolist(), ends[rows].tolist(), strict=True)]

    def errors(self) -> Iterator[dict]:
        """The rows that are not scored, in order."""
        with open(self.folder / "errors.jsonl", "rb") as file:
            yield from map(json.loads, file)


def build(
    folder: Path,
    key: str,
    sources: list[Source],
    formats: list[str],
    arguments: tuple,
    check: Callable[[], None] = lambda: None,
) -> Index:
    """The index in `folder`. Reuses a finished one with this key, continues an unfinished one, or builds a new one.

    key: hash of everything that the content depends on. arguments: those of `samples.encoder`. check: called often; it
    raises to end the work. Raises `UserError` where a row already has a field that the output adds.
    """
    done = _read(folder / "index.json")
    if done and done["key"] == key:
        return Index(folder)
    state = _read(folder / "state.json")
    if not state or state["key"] != key:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        counts = {"rows": 0, "tokens": 0, "scored_tokens": 0, "truncated": 0, "lost_tokens": 0, "without_answer": 0}
        state = {"key": key, "batches": 0, "sizes": [0] * len(FILES), "counts": {**counts, "errors": {}}, "disk": 0}
    for target in (folder / name for name in FILES):
        if target.exists():  # killed while the finished files were put in place
            os.replace(target, partial(target))
    files = [AppendFile(folder / name, size) for name, size in zip(FILES, state["sizes"], strict=True)]
    _read_rows(folder, state, files, sources, formats, arguments, check)
    for file in files:
        file.save()
        file.close()
        os.replace(file.path, file.target)
    rows = _map(folder / "rows.bin", ROW)
    _sort(rows, folder / "order.npy")
    write_atomically(folder / "index.json", dump({"key": key, "counts": state["counts"]}))
    (folder / "state.json").unlink(missing_ok=True)
    return Index(folder)


def _read_rows(folder: Path, state: dict, files: list[AppendFile], sources, formats, arguments, check) -> None:
    origins: list[str] = []

    def batches():
        for source, name in zip(sources, formats, strict=True):
            for file, batch in source.batches():
                origins.append(file)
                yield name, batch

    size = sum(source.size for source in sources)
    left = size - state["disk"]
    workers = min(available_cpus(), MOST_WORKERS) if left > PARALLEL_BYTES else 1
    saved = time.monotonic()
    title = "reading rows (continued)" if state["batches"] else "reading rows"
    with progress(title, left / 1e6, "MB") as task:
        before = state["batches"]
        for position, ((_, batch), block) in enumerate(
            ordered(encoder, arguments, islice(batches(), before, None), workers), before
        ):
            check()
            _append(state, files, block, origins[position])
            state["batches"] += 1
            state["disk"] += batch.disk
            if time.monotonic() - saved > SAVE_SECONDS:
                state["sizes"] = [file.save() for file in files]
                write_atomically(folder / "state.json", dump(state))
                saved = time.monotonic()
            task.advance(batch.disk / 1e6, f"{state['counts']['rows']:,} rows")


def _append(state: dict, files: list[AppendFile], block: Block, origin: str) -> None:
    counts, (tokens, rows, errors) = state["counts"], files
    if block.taken:
        line, name = block.taken
        raise UserError(
            f"{origin} line {line}: has a field {name} already; give the score another name (--field), or write "
            "scores without their rows (--only-idx)"
        )
    for position, line, reason, detail in block.errors:
        counts["errors"][reason] = counts["errors"].get(reason, 0) + 1
        counts.setdefault("example", f"{origin} line {line}: {reason}" + (f" ({detail})" if detail else ""))
        row = {"idx": counts["rows"] + position, "file": origin, "line": line, "reason": reason, "detail": detail}
        errors.write(to_json(row) + b"\n")
    good = block.rows["kind"] == SCORED
    counts["without_answer"] += int((good & (block.rows["scored"] == 0)).sum())
    counts["scored_tokens"] += int(block.rows["scored"].sum())
    counts["truncated"] += int(block.rows["truncated"].sum())
    counts["lost_tokens"] += block.lost
    counts["rows"] += len(block.rows)
    block.rows["end"] += counts["tokens"]
    counts["tokens"] += len(block.tokens)
    tokens.write(block.tokens.astype("<u4").tobytes())
    rows.write(block.rows.tobytes())


def _sort(rows: np.ndarray, path: Path) -> None:
    """Stable counting sort by falling cost, a piece at a time: it holds the distinct costs and one piece in memory."""
    top = 0
    for start in range(0, len(rows), SORT_ROWS):
        top = max(top, int(rows["cost"][start : start + SORT_ROWS].max(initial=0)))
    counts = np.zeros(top + 1, np.int64)
    for start in range(0, len(rows), SORT_ROWS):
        piece = rows[start : start + SORT_ROWS]
        counts += np.bincount(piece["cost"][piece["kind"] == SCORED], minlength=top + 1)
    next_place = np.cumsum(counts[::-1])[::-1] - counts  # how many rows cost more
    total = int(counts.sum())
    scratch = path.with_suffix(".tmp")
    order = np.lib.format.open_memmap(scratch, "w+", "<u4", (total,)) if total else np.empty(0, "<u4")
    for start in range(0, len(rows), SORT_ROWS):
        piece = rows[start : start + SORT_ROWS]
        chosen = np.flatnonzero(piece["kind"] == SCORED)
        costs = piece["cost"][chosen].astype(np.int64)
        by_cost = np.argsort(-costs, kind="stable")
        costs = costs[by_cost]
        within = np.arange(len(costs)) - np.searchsorted(-costs, -costs, "left")
        order[next_place[costs] + within] = start + chosen[by_cost]
        next_place += np.bincount(costs, minlength=top + 1)
    if total:
        order.flush()
        del order
        os.replace(scratch, path)
    else:
        np.save(path, order)


def _map(path: Path, dtype) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
