"""Offload to NVMe: what must be there before DeepSpeed starts, and a folder of each run's own on the disk."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ds_llm.errors import ConfigError

PARTS = ("offload_optimizer", "offload_param")


def asked(settings: dict) -> list[str]:
    """What a run's DeepSpeed JSON offloads to NVMe, of `PARTS`."""
    zero = settings["zero_optimization"]
    return [part for part in PARTS if (zero.get(part) or {}).get("device") == "nvme"]


def check(settings: dict, libaio: Callable[[], bool]) -> None:
    """Raise `ConfigError` where a run's DeepSpeed JSON asks for NVMe that this machine cannot give.

    libaio: says whether programs can be linked with it.
    """
    zero = settings["zero_optimization"]
    for part in asked(settings):
        key, path = f"deepspeed: zero_optimization.{part}", zero[part].get("nvme_path")
        if zero["stage"] != 3:
            raise ConfigError(f"{key}.device: nvme needs zero=3, not zero={zero['stage']}")
        if part == "offload_param" and "offload_optimizer" not in asked(settings):
            raise ConfigError(f"{key}.device: nvme needs zero_optimization.offload_optimizer.device=nvme too")
        if not libaio():
            raise ConfigError(
                f"{key}.device: nvme needs libaio, which is not here (Debian, Ubuntu: apt-get install libaio-dev)"
            )
        if not path or not Path(path).is_dir():
            raise ConfigError(f"{key}.nvme_path: {path}: no such folder; name one on the NVMe disk")
        try:
            with tempfile.TemporaryFile(dir=path) as probe:
                os.fsync(probe)
        except OSError as error:
            raise ConfigError(f"{key}.nvme_path: {path}: cannot be written ({error.strerror})") from None


def take_folders(settings: dict, output: str, rank: int) -> None:
    """Point `settings` to folders of the run at `output`; those of `rank` are emptied, now and at its end.

    DeepSpeed names its files by rank and weight alone: two runs with one `nvme_path` would write over each other.
    """
    name = f"ds_llm_{hashlib.sha256(str(Path(output).resolve()).encode()).hexdigest()[:16]}"
    for part in asked(settings):
        section = settings["zero_optimization"][part]
        section["nvme_path"] = str(Path(section["nvme_path"]) / name)
        _empty(Path(section["nvme_path"]), rank)
        atexit.register(_empty, Path(section["nvme_path"]), rank)


def _empty(folder: Path, rank: int) -> None:
    for own in folder.glob(f"zero_stage_3/*/rank{rank}"):
        shutil.rmtree(own, ignore_errors=True)
    for above in (*folder.glob("zero_stage_3/*"), folder / "zero_stage_3", folder):
        with contextlib.suppress(OSError):  # other ranks still have files there
            above.rmdir()
