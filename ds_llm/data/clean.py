"""Cleaning: keeps valid rows with text of the wanted length, each text once, and lists every dropped row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ds_llm.data import files, rows, statistics
from ds_llm.data.files import Batch
from ds_llm.data.resumable import SAVE_SECONDS, AppendFile, beside, partial, resumable, write_atomically
from ds_llm.data.workers import available_cpus, process
from ds_llm.errors import UserError
from ds_llm.progress import console

SEEN = np.dtype([("digest", "V16"), ("length", "<i8")])  # of each kept document; its text's hash and characters


def tidy(text: str) -> str:
    """Text with `\\n` line ends, without NUL characters and without white space at both ends."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "").strip()


def cleaner(field: str, min_chars: int, max_chars: int | None) -> Callable:
    """The worker's function: batch -> ([(number, digest, characters, line)], [Reject])."""

    def clean_batch(batch: Batch):
        kept, dropped = [], []
        for item in rows.documents(batch, field):
            if isinstance(item, rows.Document):
                item = check(item)
            (dropped if isinstance(item, rows.Reject) else kept).append(item)
        return kept, dropped

    def check(document: rows.Document):
        text = tidy(document.text)
        if not text:
            return rows.Reject(document.number, "empty", f"only NUL characters and white space in {field}")
        if len(text) < min_chars:
            return rows.Reject(document.number, "too short", f"{len(text)} characters")
        if max_chars is not None and len(text) > max_chars:
            return rows.Reject(document.number, "too long", f"{len(text)} characters")
        digest = hashlib.sha256(text.encode()).digest()[:16]
        return document.number, digest, len(text), rows.to_json(document.row | {field: text}) + b"\n"

    return clean_batch


def clean(
    inputs,
    out,
    *,
    field: str = "text",
    min_chars: int = 1,
    max_chars: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    batch_bytes: int = files.BATCH_BYTES,
    save_seconds: float = SAVE_SECONDS,
) -> dict:
    """Write the good rows of `inputs` to `out` (.jsonl), in order; returns the statistics.

    A row keeps its other fields. Beside `out`: `FILE.rejects.jsonl` (when a row was dropped), `FILE.stats.json`,
    `FILE.png`. Interrupted, the same call continues, and the result is the same byte for byte; finished, it does
    nothing. Duplicates are found by the first 128 bits of the sha256 of the tidied text; the first one stays. Takes
    about 100 bytes of memory per kept document.
    """
    out = Path(out)
    if out.suffix != ".jsonl":
        raise UserError(f"{out}: the cleaned file's name ends with .jsonl")
    if max_chars is not None and max_chars < max(min_chars, 1):
        raise UserError(f"--max-chars {max_chars} is less than --min-chars {max(min_chars, 1)}: no row could pass")
    rejects, png = beside(out, ".rejects.jsonl"), beside(out, ".png")
    sources = files.find(inputs, exclude=[out])
    settings = {
        "command": "clean",
        "inputs": [file.identity() for file in sources],
        "field": field,
        "min_chars": min_chars,
        "max_chars": max_chars,
    }
    with resumable(out, settings, overwrite) as run:
        if run.finished:
            console.print(f"{out}: finished before from the same input and settings; nothing to do")
            return run.statistics
        state = run.state or {"records": 0, "dropped": {}, "lines": 0, "rejects": 0, "seen": 0}
        lines, dropped = AppendFile(out, state["lines"]), AppendFile(rejects, state["rejects"])
        known = AppendFile(beside(out, ".seen"), state["seen"])
        outputs = {"lines": lines, "rejects": dropped, "seen": known}
        seen = {digest.tobytes() for digest in np.fromfile(known.path, SEEN)["digest"]}
        make = (field, min_chars, max_chars)
        for path, (kept, refused) in process(
            "cleaning", sources, state, cleaner, make, workers or available_cpus(), batch_bytes
        ):
            state["records"] += len(kept) + len(refused)
            first = []
            for document in kept:
                if document[1] in seen:
                    refused.append(rows.Reject(document[0], "duplicate"))
                else:
                    seen.add(document[1])
                    first.append(document)
            lines.write(b"".join(line for *_, line in first))
            known.write(np.array([(digest, length) for _, digest, length, _ in first], SEEN).tobytes())
            statistics.write_rejects(dropped, path, sorted(refused, key=lambda reject: reject.number), state)
            if run.due(save_seconds):
                run.save(state | {name: file.save() for name, file in outputs.items()})
        run.save(state | {name: file.save() for name, file in outputs.items()})
        lengths = np.fromfile(known.path, SEEN)["length"]
        if not len(lengths):
            run.discard([lines, dropped, known])
            raise UserError(f"{out}: nothing to write: {statistics.nothing_left(state)}")
        result = {"records": state["records"], "dropped": state["dropped"], "lengths": statistics.summary(lengths)}
        write_atomically(partial(png), statistics.picture(result["lengths"], "characters", out.name))
        for file in outputs.values():
            file.close()
        return run.finish([out, rejects, png], result, scratch=[known.path])
