"""Folders that appear whole (written under another name and renamed when done), and locks on folders."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ds_llm.errors import UserError, first_line


def free_folder(out: str | os.PathLike) -> Path:
    """The path of a new or empty folder. Raises `UserError` where it holds something."""
    out = Path(os.path.expanduser(str(out)))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: holds something already; name a new or empty folder")
    return out


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`. It is renamed to `out` when the block ends, and removed on an error.

    Raises `UserError` where another process is writing the same folder.
    """
    partial = out.with_name(f".{out.name}.partial")
    with writing(out):
        handle = _take(partial, out)
    try:
        yield partial
        with writing(out):
            if out.exists():
                out.rmdir()
            os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def _take(partial: Path, out: Path) -> int:
    """Create the folder `partial`, or empty the one that a killed process left, and lock it.

    The lock holds while the returned handle is open. It is on the folder itself, so that no lock file stays behind.
    """
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(f"{out}: another process is writing it; wait for it or name another folder") from None
        except OSError:
            pass  # a file system without locks
        if partial.is_dir() and os.path.samestat(os.fstat(handle), os.stat(partial)):
            break
        os.close(handle)  # it became another process's output in between
    for path in partial.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return handle


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn an `OSError` or `SafetensorError` of the block into a `UserError`: `out` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
    except SafetensorError as error:
        raise UserError(f"{out}: cannot be written ({first_line(error)})") from None


@contextmanager
def lock(output: Path) -> Iterator[None]:
    """Hold `output` for this process while the block runs.

    Raises `UserError` when another process holds the folder or it cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = open(output / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"output: {output}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"output: {output}: another run is writing there; wait for it or choose another folder"
        ) from None
    with handle:
        yield
