"""Finds input files and reads them in batches of raw records, from any position.

Formats: `.jsonl`, `.ndjson` and `.json` (one JSON object per line), `.txt` (a file is one document), each also with
`.gz` or `.zst` behind it, and `.parquet` (a row is a record).
"""

from __future__ import annotations

import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ds_llm.errors import UserError

KINDS = {".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".txt": "text", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst")
OWN_SUFFIXES = (".rejects.jsonl", ".stats.json")  # what preparation writes beside its outputs
BATCH_BYTES = 1 << 20
TEXT_LIMIT = 64 << 20  # bytes of one line or .txt document: encoding takes about 100 bytes of memory per token
PARQUET_ROWS = 16384
FORMATS = ".jsonl, .ndjson, .json, .txt (also .gz or .zst of these) and .parquet"


@dataclass(frozen=True)
class InputFile:
    """A file to read; `kind` is lines, text or parquet, `compression` is empty, .gz or .zst."""

    path: Path
    kind: str
    compression: str
    size: int  # bytes on disk
    modified: int  # nanoseconds

    def identity(self) -> list:
        """Absolute path, size and modification time, which show whether a file is still the same."""
        return [os.path.abspath(self.path), self.size, self.modified]


@dataclass(frozen=True)
class Position:
    """Where reading continues: file number, records and uncompressed bytes read of that file."""

    file: int = 0
    record: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Batch:
    """Consecutive records of one file as raw bytes, and the position behind them.

    data: whole lines, a whole text, or rows as an Arrow stream; nothing for the kind "too large", a single line of more
    than `TEXT_LIMIT` bytes. `first` is the number of the first line or row, from 1;
    `disk` is how many bytes of the file on disk were read since the batch before.
    """

    file: int
    kind: str
    first: int
    data: bytes
    after: Position
    disk: int


def find(
    inputs: str | os.PathLike | Iterable[str | os.PathLike], exclude: Iterable[str | os.PathLike] = ()
) -> list[InputFile]:
    """Input files in order: as given, sorted within a folder (searched to any depth) or a glob, each file once.

    inputs: names of files, folders or globs, or one of them.
    exclude: outputs, passed over in folders and globs. `UserError` when a file is missing, of another format or also
    an output, or when nothing is found.
    """
    outputs = {os.path.realpath(path) for path in exclude}
    found: dict[str, InputFile] = {}
    inputs = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs  # else a name's letters would be searched
    for name in map(str, inputs):
        if os.path.isfile(name):
            if os.path.realpath(name) in outputs:
                raise UserError(f"{name}: is both an input and the output; choose another --out")
            paths = [Path(name)]
        else:
            paths = [p for p in _expand(name) if os.path.realpath(p) not in outputs]
            if not paths:
                raise UserError(f"{name}: nothing to read here; known formats are {FORMATS}")
        for path in paths:
            found.setdefault(os.path.realpath(path), _inspect(path))
    if not found:
        raise UserError("no input given: name files, folders or globs")
    return list(found.values())


def _expand(name: str) -> list[Path]:
    if os.path.isdir(name):
        paths = [p for p in Path(name).rglob("*") if not any(x.startswith(".") for x in p.relative_to(name).parts)]
    elif glob.has_magic(name):
        paths = [Path(p) for p in glob.glob(os.path.expanduser(name), recursive=True)]
    else:
        raise UserError(f"{name}: no such file or folder")
    return sorted(p for p in paths if p.is_file() and _format(p) and not _other(p))


def _other(path: Path) -> bool:
    """Whether a file of a known format is no data: a record of the preparation, or part of a tokenizer."""
    return path.name.endswith(OWN_SUFFIXES) or (path.parent / "tokenizer_config.json").is_file()


def _format(path: Path) -> tuple[str, str] | None:
    """(kind, compression) by the name, or None."""
    suffixes = [s.lower() for s in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = KINDS.get(suffixes[-1] if suffixes else "")
    return None if kind is None or (kind == "parquet" and compression) else (kind, compression)


def _inspect(path: Path) -> InputFile:
    form = _format(path)
    if form is None:
        raise UserError(f"{path}: format not known by its name; known are {FORMATS}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read (permission denied)")
    stat = path.stat()
    return InputFile(path, *form, stat.st_size, stat.st_mtime_ns)


def read(files: list[InputFile], start: Position, size: int = BATCH_BYTES) -> Iterator[Batch]:
    """Batches of about `size` bytes from `start` on. A damaged file is a `UserError` naming the last good record."""
    readers = {"lines": _lines, "text": _text, "parquet": _parquet}
    for number in range(start.file, len(files)):
        file = files[number]
        position = start if number == start.file else Position(number)
        try:
            for batch in readers[file.kind](file, position, size):
                position = batch.after
                yield batch
        except (EOFError, zlib.error, gzip.BadGzipFile, *_library_errors(file)) as error:
            raise UserError(
                f"{file.path}: damaged or cut short after record {position.record:,} "
                f"({str(error).strip().split(chr(10))[0]}); replace or remove it"
            ) from None


def _library_errors(file: InputFile) -> tuple[type[Exception], ...]:
    """Exceptions of this format's reader for damaged data. Imports the reader's package only where it is needed."""
    if file.compression == ".zst":
        import zstandard

        return (zstandard.ZstdError,)
    if file.kind == "parquet":
        import pyarrow

        return (pyarrow.ArrowException, OSError)
    return ()


def _open(raw: BinaryIO, compression: str) -> BinaryIO:
    if compression == ".gz":
        return gzip.open(raw)
    return io.BufferedReader(_ZstdFrames(raw), 1 << 17) if compression == ".zst" else raw


class _ZstdFrames(io.RawIOBase):
    """The content of all frames of a file. Unlike zstandard's own reader it raises an error for a truncated frame."""

    def __init__(self, raw: BinaryIO):
        import zstandard

        self._raw, self._new = raw, zstandard.ZstdDecompressor().decompressobj
        self._frame, self._packed, self._content, self._started = self._new(), b"", memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._content:
            if self._frame.eof:
                self._packed, self._started = self._frame.unused_data, False
                self._frame = self._new()
            self._packed = self._packed or self._raw.read(1 << 17)
            if not self._packed:
                if self._started:
                    raise EOFError("the last zstd frame is incomplete")
                return 0
            self._content = memoryview(self._frame.decompress(self._packed))
            self._packed, self._started = b"", True
        count = min(len(buffer), len(self._content))
        buffer[:count], self._content = self._content[:count], self._content[count:]
        return count


def _skip(stream: BinaryIO, count: int) -> None:
    while count:
        got = len(stream.read(min(count, 1 << 20)))
        if not got:
            raise EOFError("shorter than before")
        count -= got


def _lines(file: InputFile, start: Position, size: int) -> Iterator[Batch]:
    with open(file.path, "rb") as raw:
        stream = _open(raw, file.compression)
        if file.compression:
            _skip(stream, start.offset)
        else:
            raw.seek(start.offset)
        record, offset, disk = start.record, start.offset, raw.tell()
        while data := stream.read(size):
            if not offset and ".json" in file.path.suffixes[-2:] and data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
                raise UserError(
                    f"{file.path}: a JSON array, but one JSON object per line is read; convert it, for example with: "
                    f"jq -c '.[]' {file.path} > {file.path.stem}.jsonl"
                )
            last = data.rfind(b"\n") + 1  # where the line begins that may go on behind the piece
            if last < len(data):
                data += stream.readline(TEXT_LIMIT + 1 - (len(data) - last))
            huge = not data.endswith(b"\n") and len(data) - last > TEXT_LIMIT
            if huge:
                skipped = len(data) - last + _skip_line(stream)
                data = data[:last]
            before, now = disk, raw.tell()
            if data:
                first, disk = record + 1, now
                record += data.count(b"\n") + (not data.endswith(b"\n"))
                offset += len(data)
                yield Batch(start.file, "lines", first, data, Position(start.file, record, offset), disk - before)
                before = now
            if huge:
                record, offset, disk = record + 1, offset + skipped, now
                yield Batch(start.file, "too large", record, b"", Position(start.file, record, offset), now - before)


def _skip_line(stream: BinaryIO) -> int:
    """Read to the end of the line; returns how many bytes that was."""
    count = 0
    while piece := stream.readline(BATCH_BYTES):
        count += len(piece)
        if piece.endswith(b"\n"):
            break
    return count


def _text(file: InputFile, start: Position, size: int) -> Iterator[Batch]:
    if start.record:
        return
    with open(file.path, "rb") as raw:
        data = _open(raw, file.compression).read(TEXT_LIMIT + 1)
    if len(data) > TEXT_LIMIT:
        raise UserError(
            f"{file.path}: a .txt file is one document, and this one is larger than {TEXT_LIMIT >> 20} MB; "
            "split it, or write its documents as JSONL"
        )
    yield Batch(start.file, "text", 1, data, Position(start.file, 1, len(data)), file.size)


def _parquet(file: InputFile, start: Position, size: int) -> Iterator[Batch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file.path) as table:
        rows, total, begin = start.record, max(1, table.metadata.num_rows), 0
        for group in range(table.num_row_groups):
            meta = table.metadata.row_group(group)
            begin += meta.num_rows
            if rows >= begin:
                continue
            skip = rows - (begin - meta.num_rows)
            per_batch = max(1, min(PARQUET_ROWS, size * meta.num_rows // max(1, meta.total_byte_size)))
            for batch in table.iter_batches(per_batch, row_groups=[group]):
                if skip >= batch.num_rows:
                    skip -= batch.num_rows
                    continue
                batch, skip = batch.slice(skip), 0
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, batch.schema) as writer:
                    writer.write_batch(batch)
                first, before = rows + 1, rows * file.size // total
                rows += batch.num_rows
                disk = rows * file.size // total - before
                yield Batch(start.file, "parquet", first, bytes(sink.getvalue()), Position(start.file, rows), disk)
