"""Extensions of DeepSpeed and torch that are compiled on first use: one process of a machine builds at a time.

In torch one process compiles an extension while the others wait for its lock file to vanish. If that process is killed,
they wait without end; if somebody then removes the file, they load a library that does not exist. `guard` adds a lock
that the operating system frees when its holder dies; the next holder builds what is missing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import os
import shutil
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from ds_llm import progress
from ds_llm.compat.torch import FileBaton, _get_build_directory, cpp_extension, forget_build
from ds_llm.errors import UserError

BUILD_SECONDS = 900  # more than any of DeepSpeed's parts takes
SOURCE_SECONDS = 40  # of one core, for a source that includes torch's headers; for the estimate alone
LOOK_SECONDS = 0.5  # between two checks of torch's lock
COMPILERS = frozenset({"ninja", "c++", "g++", "clang++", "cc1plus", "collect2", "as", "ld", "nvcc", "cicc", "ptxas"})
NAMES = {"cpu_adam": "DeepSpeed's Adam for the CPU", "async_io": "DeepSpeed's access to NVMe"}


def guard() -> None:
    """Replace torch's `load` of extensions by ours, and put this environment's ninja on PATH, for this process.

    DeepSpeed calls `torch.utils.cpp_extension.load` while it starts.
    """
    programs = str(Path(sys.executable).parent)  # on no PATH where the environment was not activated
    if os.environ.get("PATH", "").split(os.pathsep)[0] != programs:
        os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"
    original = cpp_extension.load
    if not hasattr(original, "__wrapped__"):
        cpp_extension.load = functools.wraps(original)(functools.partial(load, original))


def load(original: Callable, name: str, sources: str | list[str], *args, **kwargs):
    """Load an extension by `original`, torch's own `load`, with progress and an estimate on rank 0.

    Removes what a killed build left. Builds once more from scratch where the extension cannot be built or loaded.
    Raises `UserError` with the compiler's reason; does not try again where the process before has just failed.
    """
    extension = NAMES.get(name, f"the extension {name}")
    try:
        folder = Path(kwargs.get("build_directory") or _get_build_directory(name, False))
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{extension} cannot be compiled: {error.filename}: {error.strerror}; set TORCH_EXTENSIONS_DIR to another "
            "folder"
        ) from None
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"ds_llm_build_{os.getuid()}_{key}")
    log, start = folder / "ds_llm_build.log", time.time()
    files = 1 if isinstance(sources, str) else len(sources)
    expected = SOURCE_SECONDS * math.ceil(files / len(os.sched_getaffinity(0)))

    def text(seconds: float) -> str:
        left = f"about {progress.duration(expected - seconds)} left" if seconds < expected else "longer than expected"
        return f"compiling {extension}, once on this machine: {progress.duration(seconds)}, {left}"

    with progress.waiting(text), lock:
        if log.exists() and log.stat().st_mtime >= start:
            raise _failure(extension, log.read_text(), log)
        for last in (False, True):
            try:
                module = _build(folder, original, name, sources, *args, **kwargs)
            except (ImportError, OSError, RuntimeError) as error:
                forget_build(name)
                if not last:
                    _empty(folder)
                    continue
                with contextlib.suppress(OSError):  # the disk may be full
                    log.write_text(f"{error}\n")
                raise _failure(extension, str(error), log) from None
            log.unlink(missing_ok=True)
            return module


def _build(folder: Path, original: Callable, name: str, *args, **kwargs):
    mend(folder)
    with _without_stale_lock(folder):
        return original(name, *args, **kwargs)


def _failure(extension: str, said: str, log: Path) -> UserError:
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no reason was given"]
    named = [line for line in lines if "error:" in line.lower() or "not found" in line]
    return UserError(f"{extension} cannot be compiled: {(named or lines)[0]} (everything that was said: {log})")


def mend(folder: Path) -> list[Path]:
    """Remove what a killed build left in an extension's folder. Returns the removed files.

    A live builder keeps torch's lock file open, so a lock that no process of this machine has open is stale. A compiler
    may outlive the process that started it. This waits for it, because two builds at once damage ninja's record of
    dependencies. Machines that share the folder do not see each other's processes: there a stale lock must also be
    older than any build takes.

    With a damaged record ninja 1.13 compiles anew at every start (https://github.com/ninja-build/ninja/issues/2703).
    """
    removed = _remove_stale_lock(folder)
    record = folder / ".ninja_deps"
    if not (folder / "lock").exists():
        _wait_for_compilers(folder)
        if not _is_whole(record):
            removed.append(record)
            record.unlink(missing_ok=True)
    return removed


def _remove_stale_lock(folder: Path) -> list[Path]:
    lock = folder / "lock"
    if not _is_stale(lock):
        return []
    _wait_for_compilers(folder)
    lock.unlink(missing_ok=True)
    print(f"removed {lock}: the process that was compiling there is gone", file=sys.stderr, flush=True)
    return [lock]


@contextlib.contextmanager
def _without_stale_lock(folder: Path) -> Iterator[None]:
    """While the block runs, remove the lock of a builder outside `load` that is killed, for which torch would wait."""

    def look(over: threading.Event) -> None:
        while not over.wait(LOOK_SECONDS):
            _remove_stale_lock(folder)

    with progress.in_background(look):
        yield


def _is_stale(lock: Path) -> bool:
    alone = int(os.environ.get("WORLD_SIZE", "1")) <= int(os.environ.get("LOCAL_SIZE", "1"))
    for _ in range(2):  # a builder closes its lock just before it removes it
        if not lock.exists() or not (alone or _age(lock) > BUILD_SECONDS) or _is_used(lock, "fd/*"):
            return False
        time.sleep(LOOK_SECONDS)
    return lock.exists()


def _empty(folder: Path) -> None:
    """Remove all files of an extension, unless a process outside `load` is building there."""
    baton = FileBaton(str(folder / "lock"))
    if folder.is_dir() and baton.try_acquire():
        for file in folder.iterdir():
            if file.name != "lock":
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        baton.release()


def _wait_for_compilers(folder: Path) -> None:
    end, said = time.monotonic() + BUILD_SECONDS, False
    while _is_used(folder, "cwd", COMPILERS) and time.monotonic() < end:
        if not said:
            print(f"waiting for the compiler that a killed job left in {folder}", file=sys.stderr, flush=True)
        said = True
        time.sleep(0.2)


def _is_whole(record: Path) -> bool:
    """Whether ninja can read its `.ninja_deps` (version 4, ninja's src/deps_log.cc) to the end."""
    try:
        data = record.read_bytes()
    except FileNotFoundError:
        return True
    position, paths = 16, 0
    if data[:position] != b"# ninjadeps\n" + struct.pack("<I", 4):
        return not data or data.startswith(b"# ninjadeps\n")  # another version's, which ninja starts anew
    while position < len(data):
        if position + 4 > len(data):
            return False
        (size,) = struct.unpack_from("<I", data, position)
        dependencies, size = size >> 31, size & 0x7FFFFFFF
        end = position + 4 + size
        if end > len(data) or size % 4 or size < 8 + 4 * dependencies:
            return False
        if dependencies:
            target, _, *others = struct.unpack_from(f"<iq{size // 4 - 3}i", data, position + 4)
            if not all(0 <= number < paths for number in (target, *others)):
                return False
        else:
            (check,) = struct.unpack_from("<i", data, end - 4)
            if ~check != paths:
                return False
            paths += 1
        position = end
    return True


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # its builder is done
        return 0.0


def _is_used(path: Path, link: str, by: frozenset[str] = frozenset()) -> bool:
    """Whether a process of this machine has the path open (link `fd/*`) or as its working folder (link `cwd`).

    by: only processes with these names count; empty: all do.
    """
    target = str(path.resolve())
    for found in itertools.chain(Path("/proc/self").glob(link), Path("/proc").glob(f"[0-9]*/{link}")):
        try:
            if os.readlink(found) == target and (not by or (found.parent / "comm").read_text().strip() in by):
                return True
        except OSError:  # closed meanwhile, or another user's
            continue
    return False
