"""Offload to NVMe: checks before DeepSpeed starts, and a separate folder on the disk for each run."""

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
    """Those of `PARTS` that a run's DeepSpeed JSON offloads to NVMe."""
    zero = settings["zero_optimization"]
    return [part for part in PARTS if (zero.get(part) or {}).get("device") == "nvme"]


def check(settings: dict, libaio: Callable[[], bool]) -> None:
    """Raise `ConfigError` where a run's DeepSpeed JSON asks for an offload to NVMe that cannot work on this machine.

    libaio: returns whether programs can be linked with that library.
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
    """Set the paths in `settings` to folders of the run at `output`, and empty those of `rank`, now and at exit.

    DeepSpeed names its files only by rank and weight, so two runs with one `nvme_path` would overwrite each other's.
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
