"""Sources of rows: local files or data sets of the Hugging Face hub, hashes of their content, cached results.

A source is a file, a folder or a glob as `ds_llm.data.files` reads them, or the name of a data set on the hub:
`owner/name`, `owner/name/config` and either with `:split` behind it (`train` when there is none). A folder that
`datasets` saved (`save_to_disk`), and a local copy of a data set with `:split` behind it, are read by `datasets` too.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ds_llm.data import files, rows
from ds_llm.data.files import Batch, InputFile, Position
from ds_llm.data.resumable import write_atomically
from ds_llm.distributed.environment import rank
from ds_llm.errors import UserError

HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::([\w.:%+\[\]-]+))?")
HUB_ROWS = 1000  # rows of a batch from the hub


@dataclass(frozen=True)
class Source:
    """One named source: its files, or a `datasets.Dataset`."""

    name: str
    files: tuple[InputFile, ...] = ()
    dataset: Any = None

    @property
    def size(self) -> int:
        """Bytes to read."""
        return self.dataset.data.nbytes if self.dataset is not None else sum(file.size for file in self.files)

    def changed(self) -> bool:
        """Whether the size or modification time of a file has changed since it was found."""
        found = [(file, file.path.stat()) for file in self.files]
        return any((stat.st_size, stat.st_mtime_ns) != (file.size, file.modified) for file, stat in found)

    def batches(self) -> Iterator[tuple[str, Batch]]:
        """(file, batch) in order; `batch.disk` adds up to about `size`."""
        if self.dataset is None:
            for batch in files.read(list(self.files), Position()):
                yield str(self.files[batch.file].path), batch
            return
        import pyarrow as pa

        done = 0
        for table in self.dataset.with_format("arrow").iter(HUB_ROWS):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            first, done = done + 1, done + table.num_rows
            yield self.name, Batch(0, "parquet", first, bytes(sink.getvalue()), Position(0, done), table.nbytes)

    def rows(self) -> Iterator[dict]:
        """The sound rows in order."""
        for _, batch in self.batches():
            yield from (item[1] for item in rows.records(batch) if not isinstance(item, rows.Reject))


def resolve(names: Iterable[str | os.PathLike]) -> list[Source]:
    """The sources of these names, in order. Raises `UserError` for a name that cannot be found or loaded."""
    names = [os.fspath(name) for name in names]
    if not names:
        raise UserError("no data given: name files, folders, globs or data sets of the hub")
    return [_resolve(name) for name in names]


def _resolve(name: str) -> Source:
    folder, _, split = (name, "", "") if os.path.exists(name) else name.rpartition(":")
    saved = any(os.path.isfile(os.path.join(folder, file)) for file in ("state.json", "dataset_dict.json"))
    if os.path.isdir(folder) and (split or saved):
        return Source(name, dataset=_local(name, folder, split, saved))
    hub = HUB_NAME.fullmatch(name)
    if hub is None or os.path.exists(name) or glob.has_magic(name.partition(":")[0]) or name.startswith("."):
        return Source(name, tuple(files.find([name])))
    if name.endswith((*files.KINDS, *files.COMPRESSIONS, ".parquet")):
        raise UserError(f"{name}: no such file")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: no such file or folder; for data sets of the hub run: pip install datasets") from None
    if rank():
        datasets.disable_progress_bars()
    path, config, split = hub.groups()
    try:
        return Source(name, dataset=datasets.load_dataset(path, config, split=split or "train"))
    except Exception as error:  # the hub client raises errors of many libraries
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(f"{name}: no such file or folder, nor a data set that the hub gives ({reason})") from None


def _local(name: str, folder: str, split: str, saved: bool):
    """A split of a data set in a folder, `saved` by `save_to_disk` or laid out as on the hub."""
    import datasets

    try:
        if not saved:
            return datasets.load_dataset(folder, split=split)
        found = datasets.load_from_disk(folder)
    except Exception as error:  # it raises errors of many libraries
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(f"{name}: not a data set that datasets can read ({reason})") from None
    if isinstance(found, datasets.Dataset):
        if split:
            raise UserError(f"{name}: {folder} holds one split; leave out ':{split}'")
        return found
    if (split or "train") not in found:
        raise UserError(f"{name}: no split '{split or 'train'}'; it has {', '.join(found)}: write {folder}:SPLIT")
    return found[split or "train"]


def digests(sources: list[Source], cache: Path) -> list[str]:
    """sha256 (hex) of each source: of its files' contents in order, or of the data set's fingerprint in `datasets`.

    A file is read once: its hash is kept in `cache` for as long as path, size and modification time stay the same.
    """
    with _saying(cache):
        cache.mkdir(parents=True, exist_ok=True)
        record = cache / "hashes.json"
        with FileLock(cache / ".hashes.lock"):
            try:
                known = json.loads(record.read_bytes())
            except (FileNotFoundError, ValueError):
                known = {}
            before, result = dict(known), []
            for source in sources:
                parts = [source.dataset._fingerprint] if source.dataset is not None else []
                for file in source.files:
                    key = json.dumps(file.identity())
                    if key not in known:
                        with open(file.path, "rb") as content:
                            known[key] = hashlib.file_digest(content, "sha256").hexdigest()
                    parts.append(known[key])
                result.append(hashlib.sha256(json.dumps(parts).encode()).hexdigest())
            if known != before:
                write_atomically(record, json.dumps(known, indent=1).encode())
        return result


@contextmanager
def _saying(folder: Path) -> Iterator[None]:
    """Turn an `OSError` of the block, as on a full or read-only disk, into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None


def build_once(cache: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The folder of `key` in `cache`; `build(folder)` creates it where it is missing.

    One process builds while others that need the same folder wait. The folder appears when it is whole. This needs no
    process group. With several processes call it before their first collective, so that none waits there.
    """
    folder = cache / key[:32]
    with _saying(folder):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{folder.name}.lock"):
            if not folder.is_dir():
                scratch = cache / f".{folder.name}.partial"
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir()
                try:
                    build(scratch)
                    os.replace(scratch, folder)
                except BaseException:
                    shutil.rmtree(scratch, ignore_errors=True)
                    raise
    return folder
