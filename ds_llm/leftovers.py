"""What DeepSpeed and torch leave on a machine, and what breaks the next job there: shared buffers and build locks."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from filelock import FileLock
from torch.utils.cpp_extension import get_default_build_root

from ds_llm.progress import console

SHARED_BUFFER_BYTES = 66 * 2**20 + 8  # struct allreduce_workspace in DeepSpeed's csrc/cpu/comm/shm.cpp
BUILD_SECONDS = 900  # more than any of DeepSpeed's CPU parts takes


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


def remove_stale_build_locks() -> list[Path]:
    """Remove the build locks that killed processes left in torch's cache of extensions; returns them.

    torch waits for such a lock without end and without a word. A live builder keeps its lock open, so a lock that no
    process of this machine has open is stale. Machines of a job may share the cache and do not see each other's
    processes: there a lock must also be older than any build takes.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) <= int(os.environ.get("LOCAL_SIZE", "1"))
    root = _build_root()
    if not any(root.rglob("lock")):
        return []
    with FileLock(Path(tempfile.gettempdir()) / f"ds_llm_build_locks_{os.getuid()}"):
        stale = [path for path in root.rglob("lock") if (alone or _age(path) > BUILD_SECONDS) and not _is_open(path)]
        for path in stale:
            path.unlink(missing_ok=True)
            print(f"removed {path}: the process that was compiling there is gone", file=sys.stderr, flush=True)
    return stale


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # its builder is done
        return 0.0


def _build_root() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _is_open(path: Path) -> bool:
    target = str(path.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == target:
                return True
        except OSError:  # closed meanwhile, or another user's
            continue
    return False
