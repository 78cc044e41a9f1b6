"""Outputs that survive a kill: `.partial` files with unfinished work, and a record of how much of them is valid.

For the output `FILE`: `FILE.partial.json` is the record (settings, position in the inputs, lengths of the partial
files); `.FILE.lock` excludes a second run; `FILE.stats.json` is written last, with the settings of the whole output.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

from filelock import FileLock, Timeout

from ds_llm.errors import UserError

SAVE_SECONDS = 2.0


def beside(path: Path, suffix: str) -> Path:
    """A file in the same folder: the name of `path` and `suffix` behind it."""
    return path.with_name(path.name + suffix)


def partial(path: Path) -> Path:
    """Where a file lies until it is finished."""
    return beside(path, ".partial")


def statistics_path(output: Path) -> Path:
    """`FILE.stats.json` beside an output file; `stats.json` in an output folder."""
    return beside(output, ".stats.json") if output.suffix in (".jsonl", ".bin") else output / "stats.json"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that a reader sees the old or the new content, also after a power failure."""
    with open(scratch := beside(path, ".tmp"), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def dump(content: dict) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


class AppendFile:
    """A `.partial` file that grows. Opening it at `size` bytes drops what an interrupted run wrote behind them."""

    def __init__(self, target: Path, size: int = 0):
        self.target, self.path = target, partial(target)
        if size and (not self.path.exists() or self.path.stat().st_size < size):
            raise UserError(
                f"{self.path}: unfinished work is missing here; remove the *.partial.json beside it to start over"
            )
        self.file = open(self.path, "r+b" if size else "wb")  # noqa: SIM115 closed in close()
        self.file.seek(size)
        self.file.truncate()
        self.size = size

    def write(self, data) -> None:
        self.size += self.file.write(data)

    def save(self) -> int:
        """Flush the file to the disk. Returns its size in bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.size

    def close(self) -> None:
        self.file.close()


class Run:
    """One resumable run for `output`; see `resumable`.

    finished: the output exists already, with the same settings, and `statistics` are its statistics. state: the last
    state that an interrupted run saved, empty for a new run.
    """

    def __init__(self, output: Path, settings: dict, overwrite: bool):
        self.output, self.settings = output, json.loads(json.dumps(settings))
        settings = self.settings
        self.record = beside(output, ".partial.json")
        self.statistics, self.state, self.finished, self._saved = {}, {}, False, monotonic()
        record = _read(self.record)
        if record and record["settings"] != settings and not overwrite:
            raise UserError(
                f"{output}: an unfinished run with another {_difference(record['settings'], settings)} is there; "
                "repeat its command to continue it, or start over with --overwrite"
            )
        if record and record["settings"] == settings:
            if "moves" in record:  # killed while the finished files were put in place
                self._publish(record["moves"], record["scratch"])
            else:
                self.state = record["state"]
                return
        elif record:
            self.record.unlink()
        done = _read(statistics_path(output))
        self.finished = bool(done and done["settings"] == settings and output.exists() and (not overwrite or record))
        if self.finished:
            self.statistics = done
        elif output.exists() and not overwrite and not (output.is_dir() and not any(output.iterdir())):
            why = f"made from another {_difference(done['settings'], settings)}" if done else "of unknown origin"
            raise UserError(f"{output}: is there already, {why}; use --overwrite or choose another --out")

    def due(self, seconds: float) -> bool:
        """Whether the last save is `seconds` ago."""
        return monotonic() - self._saved >= seconds

    def save(self, state: dict) -> None:
        """Record how much of the partial files, which are flushed already, is valid."""
        write_atomically(self.record, dump({"settings": self.settings, "state": state}))
        self._saved = monotonic()

    def discard(self, files: list[AppendFile]) -> None:
        """Remove the unfinished work, where continuing it is of no use."""
        for file in files:
            file.close()
            file.path.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)

    def finish(self, paths: list[Path], statistics: dict, scratch: list[Path]) -> dict:
        """Put the finished partial files of `paths` in place, the statistics last, and remove the files `scratch`.

        The partial files hold their final content on the disk. An empty one is not published, and a file that an
        earlier run left in its place is removed. Returns the statistics with the settings.
        """
        self.statistics = statistics | {"settings": self.settings}
        for path in [p for p in paths if not partial(p).stat().st_size]:
            partial(path).unlink()
            path.unlink(missing_ok=True)
            paths.remove(path)
        target = statistics_path(self.output)
        write_atomically(partial(target), dump(self.statistics))
        moves = [(partial(path), path) for path in [*paths, target]]
        plan = {
            "moves": [[os.path.abspath(source), os.path.abspath(target)] for source, target in moves],
            "scratch": [os.path.abspath(path) for path in scratch],
        }
        write_atomically(self.record, dump({"settings": self.settings, **plan}))
        self._publish(**plan)
        return self.statistics

    def _publish(self, moves: list[list[str]], scratch: list[str]) -> None:
        """Rename the files that are not renamed yet. A second call after a kill gives the same result."""
        waiting = [(source, target) for source, target in moves if os.path.exists(source)]
        for _, target in waiting[1:]:  # a reader never sees an index or statistics of other contents
            Path(target).unlink(missing_ok=True)
        for source, target in waiting:
            os.replace(source, target)
        for path in scratch:
            Path(path).unlink(missing_ok=True)
        self.record.unlink()


@contextmanager
def resumable(output: Path, settings: dict, overwrite: bool = False):
    """Yields the `Run` for an output while this process holds its lock.

    `UserError` when another process works on it, or when it exists (finished or not) from other settings and
    `overwrite` is false. An `OSError` in the block, such as a full disk, becomes a `UserError`; what was saved stays.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output.with_name(f".{output.name}.lock"), timeout=0)
        with lock:
            yield Run(output, settings, overwrite)
    except Timeout:
        raise UserError(f"{output}: another process is writing it; wait for it or choose another --out") from None
    except OSError as error:
        where = error.filename or output
        raise UserError(
            f"{where}: {error.strerror or error}; what was done is kept, the same command continues when that is mended"
        ) from None


def _read(path: Path) -> dict | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path}: not readable as JSON; remove it") from None
    return content if isinstance(content, dict) and "settings" in content else None


def _difference(old: dict, new: dict) -> str:
    names = [name for name in new if old.get(name) != new[name]] or ["settings"]
    return " and ".join(names)
