"""Files to which ranks append their scores; a kill at any byte does no harm.

A part begins with a header that identifies its run, followed by a record per batch: length, checksum, number of the
batch, values. One process writes a part, and no other continues it. Bytes behind the last whole record are ignored.
"""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from ds_llm.errors import UserError

MAGIC = b"dsscore1"
RECORD = struct.Struct("<III")  # bytes of the payload, crc32 of number and payload, number of the batch
SYNC_SECONDS = 1.0  # work that a power failure may cost; a killed process loses only the batch at hand


class Part:
    """A part to append to; `settings` name what its scores depend on."""

    def __init__(self, path: Path, settings: dict):
        self.path = path
        header = json.dumps(settings, sort_keys=True).encode()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._synced = 0.0
        self._write(MAGIC + _record(0, header))
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def append(self, batch: int, payload: bytes) -> None:
        """Add the values of a batch. They survive a kill at once, and a power failure after `SYNC_SECONDS`."""
        self._write(_record(batch, payload))

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file)
            self._synced = time.monotonic()


def _record(batch: int, payload: bytes) -> bytes:
    number = struct.pack("<I", batch)
    return RECORD.pack(len(payload), zlib.crc32(payload, zlib.crc32(number)), batch) + payload


def read(path: Path) -> Iterator[tuple[int, bytes]]:
    """The header as (0, JSON), then (batch, payload) of every record up to the first that is not whole."""
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return
        while len(head := file.read(RECORD.size)) == RECORD.size:
            length, checksum, batch = RECORD.unpack(head)
            if length > os.fstat(file.fileno()).st_size:
                return
            payload = file.read(length)
            if len(payload) < length or zlib.crc32(payload, zlib.crc32(struct.pack("<I", batch))) != checksum:
                return
            yield batch, payload


def records(folder: Path, settings: dict) -> Iterator[tuple[int, bytes]]:
    """(batch, payload) of every whole record in the parts of a folder; the first one of each batch.

    Raises `UserError` for a part of another run. Skips parts that end within their header.
    """
    seen = set()
    for path in sorted(folder.glob("part-*.bin")):
        found = read(path)
        header = next(found, None)
        if header is None:
            _check_empty(path)
            continue
        _check_header(path, header[1], settings)
        for batch, payload in found:
            if batch not in seen:
                seen.add(batch)
                yield batch, payload


def differences(old: dict, new: dict) -> str:
    """The different settings of two runs, as `model ('a', not 'b') and metric`; empty where all are equal."""
    parts = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            short = all(len(str(value.get(name))) <= 40 for value in (old, new))
            parts.append(f"{name} ({old.get(name)!r} there, {new.get(name)!r} now)" if short else name)
    return " and ".join(parts)


def _check_empty(path: Path) -> None:
    with open(path, "rb") as file:
        if not MAGIC.startswith(file.read(len(MAGIC))):
            raise UserError(f"{path}: is no part of a scoring run; remove it")


def _check_header(path: Path, header: bytes, settings: dict) -> None:
    if difference := differences(json.loads(header), settings):
        raise UserError(
            f"{path}: holds scores of another run, with another {difference}; remove it, or choose another --out"
        )
