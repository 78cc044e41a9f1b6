"""Folders that appear whole: written beside their place and moved there when all is well."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ds_llm.errors import UserError


def free_folder(out: str | os.PathLike) -> Path:
    """The folder to write; `UserError` when it holds something."""
    out = Path(os.path.expanduser(str(out)))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: holds something already; name a new or empty folder")
    return out


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` when the block ends well, and is removed otherwise."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(out):
            partial.mkdir(parents=True)
        yield partial
        with writing(out):
            if out.exists():
                out.rmdir()
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """A block of which an `OSError` means that `out` cannot be written: it becomes a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
