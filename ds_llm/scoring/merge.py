"""Merges the parts of all ranks into one output in the order of the input, with a slice of it in memory.

The parts hold rows in the order of the plan. First these go into buckets, each for a range of the input. Then each
bucket is sorted and joined with the input, which is read once more.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ds_llm.data.resumable import beside
from ds_llm.data.rows import BOM, Reject, records, to_json
from ds_llm.data.sources import Source
from ds_llm.errors import UserError
from ds_llm.progress import progress
from ds_llm.scoring import parts
from ds_llm.scoring.batches import Plan
from ds_llm.scoring.index import Index
from ds_llm.scoring.samples import NO_OBJECT, SCORED

BUCKET_BYTES, MOST_BUCKETS = 64 << 20, 512  # of scores as they lie in the parts
WRITE_ROWS = 16384  # turned into JSON at a time
ROW = "__row"  # column of a bucket that says which input row it is


@dataclass
class Output:
    """The output files. schema: of the records of a part. fields: metric's column -> name in the output.

    token_columns: columns with a list per row, written to `tokens.parquet`. arrays: column -> file for its arrays.
    """

    out: Path
    folder: Path
    schema: pa.Schema
    fields: dict[str, str]
    token_columns: list[str] = field(default_factory=list)
    arrays: dict[str, Path] = field(default_factory=dict)
    only_idx: bool = False

    @property
    def rows_path(self) -> Path:
        return self.folder / "rows.parquet"

    @property
    def tokens_path(self) -> Path:
        return self.folder / "tokens.parquet"

    def row_schema(self) -> pa.Schema:
        """Of `rows.parquet`: a row for each input row."""
        first = [("idx", pa.int64()), ("length", pa.int32()), ("truncated", pa.bool_()), ("tokens", pa.int64())]
        scores = [(name, self.schema.field(column).type) for column, name in self.fields.items()]
        return pa.schema([*first, *scores, ("error", pa.string())])

    def token_schema(self) -> pa.Schema:
        """Of `tokens.parquet`: a row for each scored input row."""
        return pa.schema([("idx", pa.int64()), *((name, self.schema.field(name).type) for name in self.token_columns)])


def merge(
    output: Output,
    index: Index,
    plan: Plan,
    settings: dict,
    sources: list[Source],
    check: Callable[[], None] = lambda: None,
) -> Counter:
    """Write the output, `rows.parquet`, `tokens.parquet` and the arrays. Returns the number of rows per error.

    check: called often; it raises to end the work. Raises `UserError` where scores are missing or the input has changed
    since it was indexed. Files appear when they are whole.
    """
    count = index.counts["rows"]
    scratch = output.folder / "merge"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    size = sum(path.stat().st_size for path in output.folder.glob("parts/part-*.bin"))
    width = -(-count // max(1, min(MOST_BUCKETS, -(-size // BUCKET_BYTES))))  # rows of a bucket
    _deal(output, index, plan, settings, scratch, width)
    writer = _Writer(output, index, None if output.only_idx else input_lines(sources))
    with writer, progress("writing scores", count, "rows") as task:
        for start in range(0, count, width):
            end = min(count, start + width)
            table = _bucket(scratch / f"{start // width}.arrow", output)
            for first in range(start, end, WRITE_ROWS):
                last = min(end, first + WRITE_ROWS)
                check()
                writer.write(table, first, last)
                task.advance(last - first)
        writer.publish(sources)
    shutil.rmtree(scratch)
    return writer.errors


def _deal(output: Output, index: Index, plan: Plan, settings: dict, scratch: Path, width: int) -> None:
    """Write the rows of all parts to buckets, each for a range of the input."""
    schema = pa.schema([(ROW, pa.int64()), *output.schema])
    with ExitStack() as stack:
        writers: dict[int, pa.RecordBatchWriter] = {}

        def flush(batches: list[pa.RecordBatch]) -> None:
            table = pa.Table.from_batches(batches, schema)
            table = table.take(pa.array(np.argsort(table[ROW].to_numpy(), kind="stable")))
            owners = table[ROW].to_numpy() // width
            for bucket in np.unique(owners).tolist():
                if bucket not in writers:
                    file = stack.enter_context(open(scratch / f"{bucket}.arrow", "wb"))
                    writers[bucket] = stack.enter_context(pa.ipc.new_stream(file, schema))
                low, high = np.searchsorted(owners, [bucket, bucket + 1])
                writers[bucket].write_table(table.slice(low, high - low))

        held, size = [], 0
        for batch, payload in parts.records(output.folder / "parts", settings):
            values = pa.ipc.read_record_batch(pa.py_buffer(payload), output.schema)
            held.append(pa.RecordBatch.from_arrays([pa.array(plan.rows(index, batch)), *values.columns], schema=schema))
            size += len(payload)
            if size >= BUCKET_BYTES:
                flush(held)
                held, size = [], 0
        if held:
            flush(held)


def _bucket(path: Path, output: Output) -> pa.Table:
    """A bucket in the order of the input."""
    if not path.exists():
        return pa.schema([(ROW, pa.int64()), *output.schema]).empty_table()
    with pa.ipc.open_stream(path) as stream:
        table = stream.read_all()
    path.unlink()
    return table.take(pa.array(np.argsort(table[ROW].to_numpy(), kind="stable")))


def input_lines(sources: list[Source]) -> Iterator[bytes]:
    """Every input row as a line of JSON; the raw bytes where it is no JSON."""
    for source in sources:
        for _, batch in source.batches():
            if batch.kind == "lines":
                lines = (batch.data.removeprefix(BOM) if batch.first == 1 else batch.data).split(b"\n")
                yield from lines if lines[-1] else lines[:-1]
            else:
                for record in records(batch):
                    yield b"" if isinstance(record, Reject) else to_json(record[1])


class _Writer:
    """The outputs, written side by side in the order of the input; a context manager."""

    def __init__(self, output: Output, index: Index, inputs: Iterator[bytes] | None):
        self.output, self.index, self.inputs = output, index, inputs
        self.errors: Counter = Counter()
        self._unusable = index.errors()
        self._stack = ExitStack()
        self._files: dict[Path, object] = {}

    def __enter__(self):
        self._lines = self._open(self.output.out)
        self._rows = self._parquet(self.output.rows_path, self.output.row_schema())
        self._tokens = None
        if self.output.token_columns:
            self._tokens = self._parquet(self.output.tokens_path, self.output.token_schema())
        self._arrays = {column: self._array(column, path) for column, path in self.output.arrays.items()}
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def write(self, table: pa.Table, first: int, last: int) -> None:
        """The input rows `first` to `last - 1`, whose scores are in `table`."""
        meta = self.index.rows[first:last]
        low, high = np.searchsorted(table[ROW].to_numpy(), [first, last])
        scores = table.slice(low, high - low)
        present = scores[ROW].to_numpy() - first
        expected = np.flatnonzero(meta["kind"] == SCORED)
        if not np.array_equal(present, expected):
            raise UserError(f"scores of {len(expected) - len(present):,} of the rows {first:,} to {last:,} are missing")
        places = np.full(last - first, -1)
        places[present] = np.arange(len(present))
        spread = scores.take(pa.array(places, mask=places < 0))
        errors, wheres = self._errors(meta, spread["error"].to_pylist())
        ends = np.concatenate([[self.index.rows["end"][first - 1] if first else 0], meta["end"]])
        columns = {
            "idx": pa.array(np.arange(first, last)),
            "length": pa.array(np.diff(ends), pa.int32()),
            "truncated": pa.array(meta["truncated"]),
            "tokens": spread["tokens"],
            **{name: spread[column] for column, name in self.output.fields.items()},
            "error": pa.array(errors, pa.string()),
        }
        self._rows.write_table(pa.table(columns, self.output.row_schema()))
        if self._tokens is not None:
            lists = {"idx": scores[ROW], **{name: scores[name] for name in self.output.token_columns}}
            self._tokens.write_table(pa.table(lists, self.output.token_schema()))
        for column, file in self._arrays.items():
            found = scores[column].combine_chunks().to_numpy_ndarray()
            block = np.full((last - first, *found.shape[1:]), np.nan, "<f2")
            block[present] = found
            file.write(block.tobytes())
        fields = list(self.output.fields.values())
        values = zip(*(columns[name].to_pylist() for name in fields), strict=True)
        for i, (value, error) in enumerate(zip(values, errors, strict=True)):
            self._lines.write(self._line(first + i, dict(zip(fields, value, strict=True)), error, wheres[i]) + b"\n")

    def publish(self, sources: list[Source]) -> None:
        """Put the files in place when all rows are written and the input is still what was indexed."""
        if any(source.changed() for source in sources):
            raise self._changed()
        if self.inputs is not None and next(self.inputs, None) is not None:
            raise self._changed()
        self._stack.close()
        for path in self._files:
            with open(beside(path, ".tmp"), "rb+") as file:
                os.fsync(file.fileno())
            os.replace(beside(path, ".tmp"), path)

    def _open(self, path: Path):
        self._files[path] = self._stack.enter_context(open(beside(path, ".tmp"), "wb", 1 << 20))  # noqa: SIM115
        return self._files[path]

    def _parquet(self, path: Path, schema: pa.Schema) -> pq.ParquetWriter:
        return self._stack.enter_context(pq.ParquetWriter(self._open(path), schema))

    def _array(self, column: str, path: Path):
        """A .npy file [input rows, ...], its header written."""
        shape = (len(self.index.rows), *self.output.schema.field(column).type.shape)
        file = self._open(path)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        return file

    def _errors(self, meta: np.ndarray, found: list[str | None]) -> tuple[list[str | None], list[dict | None]]:
        """Each row's error, and for rows that are no objects where they stand."""
        wheres: list[dict | None] = [None] * len(found)
        for i in np.flatnonzero(meta["kind"] != SCORED).tolist():
            bad = next(self._unusable)
            self.errors[bad["reason"]] += 1
            found[i] = bad["reason"] + (f" ({bad['detail']})" if bad["detail"] else "")
            if meta["kind"][i] == NO_OBJECT:
                wheres[i] = {"file": bad["file"], "line": bad["line"]}
        for i in np.flatnonzero(meta["kind"] == SCORED).tolist():
            if found[i]:
                self.errors[found[i]] += 1
        return found, wheres

    def _line(self, row: int, scores: dict, error: str | None, where: dict | None) -> bytes:
        raw = b"" if self.inputs is None else next(self.inputs, None)
        if raw is None:
            raise self._changed()
        added = scores if error is None else {**scores, "error": error}
        if self.inputs is None:
            return to_json({"idx": row, **added})
        if where is not None:
            return to_json({**where, **added})
        raw = raw.rstrip()
        if not raw.endswith(b"}"):
            raise self._changed()
        if error is not None and b'"error"' in raw:  # perhaps from an earlier run: a key twice is no good JSON
            return to_json({**json.loads(raw), **added})
        body = raw[:-1].rstrip()  # the row itself stays as it was written, digit for digit
        return body + (b"" if body.endswith(b"{") else b", ") + to_json(added)[1:]

    def _changed(self) -> UserError:
        return UserError("the input was changed while it was scored; run the same command again")
