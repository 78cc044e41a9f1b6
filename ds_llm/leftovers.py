"""What DeepSpeed and torch leave on a machine, and what breaks the next job there: shared buffers, builds cut off."""

from __future__ import annotations

import os
import struct
import sys
import tempfile
import time
from pathlib import Path

from filelock import FileLock

from ds_llm.compat.torch import get_default_build_root
from ds_llm.progress import console

SHARED_BUFFER_BYTES = 66 * 2**20 + 8  # struct allreduce_workspace in DeepSpeed's csrc/cpu/comm/shm.cpp
BUILD_SECONDS = 900  # more than any of DeepSpeed's CPU parts takes
COMPILERS = frozenset({"ninja", "c++", "g++", "clang++", "cc1plus", "collect2", "as", "ld", "nvcc", "cicc", "ptxas"})


def shared_memory_suffices(processes: int, folder: str = "/dev/shm") -> bool:
    """Whether the buffers of `processes` local processes fit; DeepSpeed does not look, and a full one kills the job.

    Says so on rank 0 where they do not.
    """
    needed = processes * SHARED_BUFFER_BYTES
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if free < needed and os.environ.get("RANK", "0") == "0":
        console.print(
            f"{folder} has {free / 2**20:.0f} MiB free, shared-memory communication needs {needed / 2**20:.0f}: "
            "using gloo, which is slower (in Docker: --shm-size=1g)"
        )
    return free >= needed


def unlink_shared_buffer() -> None:
    """Remove the name of this rank's buffer in /dev/shm, which DeepSpeed never does: 66 MiB of memory per process."""
    address, port, rank = (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


def announce_build(extension: str, what: str) -> None:
    """Say what the coming silence is: DeepSpeed compiles its CPU parts when they are first used."""
    if not any(_build_root().rglob(f"{extension}*.so")):
        console.print(f"compiling DeepSpeed's {what} for the CPU, once; this takes a minute or two")


def mend_builds() -> list[Path]:
    """Remove what builds that were killed left in torch's cache of extensions; returns the files.

    torch waits for the lock of a killed builder without end and without a word. A live builder keeps its lock open, so
    a lock that no process of this machine has open is stale. The compiler that it started may outlive it and is waited
    for: two at once damage ninja's record of dependencies. Machines of a job may share the cache and do not see each
    other's processes: there a lock must also be older than any build takes.

    With a damaged record ninja 1.13 compiles anew at every start (https://github.com/ninja-build/ninja/issues/2703).
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) <= int(os.environ.get("LOCAL_SIZE", "1"))
    root, removed = _build_root(), []
    if not root.is_dir():
        return []
    with FileLock(Path(tempfile.gettempdir()) / f"ds_llm_build_locks_{os.getuid()}"):
        for lock in root.rglob("lock"):
            if (alone or _age(lock) > BUILD_SECONDS) and not _is_used(lock, "fd/*"):
                _wait_for_compilers(lock.parent)
                removed.append(lock)
                lock.unlink(missing_ok=True)
                say = "the process that was compiling there is gone"
                print(f"removed {lock}: {say}", file=sys.stderr, flush=True)
        for record in root.rglob(".ninja_deps"):
            if not (record.parent / "lock").exists() and not _is_whole(record):
                removed.append(record)
                record.unlink(missing_ok=True)
    return removed


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
    place, paths = 16, 0
    if data[:place] != b"# ninjadeps\n" + struct.pack("<I", 4):
        return not data or data.startswith(b"# ninjadeps\n")  # another version's, which ninja starts anew
    while place < len(data):
        if place + 4 > len(data):
            return False
        (size,) = struct.unpack_from("<I", data, place)
        dependencies, size = size >> 31, size & 0x7FFFFFFF
        end = place + 4 + size
        if end > len(data) or size % 4 or size < 8 + 4 * dependencies:
            return False
        if dependencies:
            target, _, *others = struct.unpack_from(f"<iq{size // 4 - 3}i", data, place + 4)
            if not all(0 <= number < paths for number in (target, *others)):
                return False
        else:
            (check,) = struct.unpack_from("<i", data, end - 4)
            if ~check != paths:
                return False
            paths += 1
        place = end
    return True


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # its builder is done
        return 0.0


def _build_root() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _is_used(path: Path, link: str, by: frozenset[str] = frozenset()) -> bool:
    """Whether a process of this machine, or one of these names, has the path open (`fd/*`) or works there (`cwd`)."""
    target = str(path.resolve())
    for found in Path("/proc").glob(f"[0-9]*/{link}"):
        try:
            if os.readlink(found) == target and (not by or (found.parent / "comm").read_text().strip() in by):
                return True
        except OSError:  # closed meanwhile, or another user's
            continue
    return False
