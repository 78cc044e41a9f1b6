"""Checkpoints of a run: written whole or not at all, verified before use, old ones deleted.

    OUTPUT/checkpoints/step-00000100/
        manifest.json    sizes and CRC-32 of all other files; written last
        trainer.json     state of the training loop: step, position in the data, best perplexity
        deepspeed/       optimizer, master weights and averages of each rank
        model/           the model in Hugging Face format (averaged weights when there is an average)

A checkpoint is built in a folder whose name starts with a dot and renamed when everything is on disk.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError

from ds_llm.distributed import shared_folder, watchdog
from ds_llm.distributed.collectives import check_all, gather
from ds_llm.errors import UserError, first_line
from ds_llm.progress import console

NAME = re.compile(r"step-(\d{8})")


def folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:08d}"


def steps(output: Path) -> list[int]:
    """Steps of the finished checkpoints, newest first."""
    found = (output / "checkpoints").glob("step-*")
    return sorted((int(m[1]) for p in found if (m := NAME.fullmatch(p.name))), reverse=True)


def save(output: Path, step: int, state: dict, write: Callable[[Path], None], needed_bytes: int) -> Path:
    """Write one checkpoint. Collective: `write(folder)` writes this rank's part.

    needed_bytes: bytes that this rank will write. Raises `UserError` on every rank, before anything is written, where
    the disk has too little space for all ranks; raises it on one rank where the disk fills up while it writes. Machines
    without a shared folder keep their ranks' parts (see `ds_llm.distributed.shared_folder`).
    """
    with watchdog.during(f"saving {folder(output, step).name}"):
        return _save(output, step, state, write, needed_bytes)


def _save(output: Path, step: int, state: dict, write: Callable[[Path], None], needed_bytes: int) -> Path:
    target = folder(output, step)
    partial = target.with_name(f".{target.name}.partial")
    world, shared = dist.get_world_size(), shared_folder.of(output)
    lack = _lack(output, shared, needed_bytes)
    check_all(lack and f"{target}: not saved: {lack}; {_newest(output)}. Free some space and continue with resume=auto")
    try:
        if shared.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        write(partial)
        if shared.is_first:
            _write_json(partial / "trainer.json", state)
        dist.barrier()
        shared_folder.complete(shared, partial, _files)
        mine = {name: _checksum(partial / name) for name in sorted(_files(partial))[shared.index :: len(shared.ranks)]}
        parts = gather(mine)
        if shared.is_first:
            files = {name: entry for rank in shared.ranks for name, entry in parts[rank].items()}
            manifest = {"step": step, "world_size": world, "ranks": shared.ranks, "files": files}
            _write_json(partial / "manifest.json", manifest)
            _sync_folder(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            _sync_folder(target.parent)
        dist.barrier()
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_disk_error(error):
            raise
        raise UserError(
            f"{target}: not saved: {_reason(error)}; {_newest(output)}. Free some space and continue with resume=auto",
            any_rank=True,
        ) from error
    return target


def check_space(output: Path, needed_bytes: int) -> None:
    """Raise `UserError` on every rank where the disk cannot hold one more checkpoint. Collective.

    needed_bytes: bytes of it that this rank will write.
    """
    lack = _lack(output, shared_folder.of(output), needed_bytes)
    check_all(
        lack and f"output: {output}: not enough space for a checkpoint: {lack}; free some space or name another folder"
    )


def _lack(output: Path, shared: shared_folder.SharedFolder, needed_bytes: int) -> str | None:
    """What the disk lacks for a checkpoint of the ranks that share the folder, in words. Collective."""
    sizes = gather(needed_bytes)
    needed, free = sum(sizes[rank] for rank in shared.ranks), _free_bytes(output)
    if needed <= free:
        return None
    where = "" if shared.by_all else f" on {shared.hosts[shared.ranks[0]]}"
    return f"it needs about {_size(needed)}, the disk{where} has {_size(free)}"


def newest_whole(output: Path) -> Path | None:
    """The newest checkpoint whose files all match its manifest; warns of damaged ones.

    Collective: each rank checks its share of the files.
    """
    for step in shared_folder.common_steps(shared_folder.of(output), steps(output)):
        reason = damage(folder(output, step))
        if reason is None:
            return folder(output, step)
        console.print(f"warning: {folder(output, step)} is damaged ({reason}); looking for an older one")
    return None


def damage(path: Path) -> str | None:
    """Why a checkpoint is damaged, or None. Collective: ranks that share the folder check a share of the files each."""
    shared = shared_folder_of(path)
    files, mine = [], None
    try:
        files = _listed(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = type(error).__name__ if isinstance(error, (OSError, RecursionError)) else error
        mine = f"manifest.json or trainer.json cannot be read: {reason}"
    for name, entry in files[shared.index :: len(shared.ranks)]:
        try:
            found = _checksum(path / name)
        except OSError:
            mine = f"{name} is missing"
            break
        if found != entry:
            fault = "has another size" if found["bytes"] != entry["bytes"] else "has other content"
            mine = f"{name} {fault} than when it was saved"
            break
    if mine and not shared.by_all:
        mine += f", on {shared.hosts[dist.get_rank()]}"
    reasons = [r for r in gather(mine) if r]
    return reasons[0] if reasons else None


def shared_folder_of(path: Path) -> shared_folder.SharedFolder:
    """The ranks that share the folder of a checkpoint. Collective."""
    inside = NAME.fullmatch(path.name) is not None
    return shared_folder.of(path.absolute().parent.parent if inside else path, writable=False)


def _listed(path: Path) -> list[tuple[str, dict]]:
    """Every file of a checkpoint with its size and checksum, from the manifest.

    Raises OSError, ValueError, KeyError, TypeError, AttributeError or RecursionError for a bad manifest.json or
    trainer.json.
    """
    manifest, state = (json.loads((path / name).read_text()) for name in ("manifest.json", "trainer.json"))
    files = sorted(manifest["files"].items())
    for name, entry in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"it names {name}, outside of the checkpoint")
        _ = entry["bytes"], entry["crc32"]
    _ = manifest["files"]["trainer.json"], manifest["world_size"], state["step"], state["config"], state["fingerprint"]
    return files


def read_state(path: Path) -> dict:
    """The content of `trainer.json` of a checkpoint, and the world size that saved it."""
    try:
        state = json.loads((path / "trainer.json").read_text())
        manifest = json.loads((path / "manifest.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not a checkpoint (trainer.json or manifest.json is missing)") from None
    except ValueError as error:
        raise UserError(f"{path}: trainer.json or manifest.json is damaged ({error})") from None
    return state | {"world_size": manifest["world_size"]}


def prune(output: Path, keep: int, best: int | None) -> None:
    """Delete all checkpoints but the newest `keep` and the best one; with `keep` 0 none. On rank 0."""
    for leftover in (output / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not keep:
        return
    for step in steps(output)[keep:]:
        if step != best:
            doomed = folder(output, step)
            # renamed first: a kill during the deletion must not leave half a checkpoint under a good name
            trash = doomed.rename(doomed.with_name(f".{doomed.name}.partial"))
            shutil.rmtree(trash, ignore_errors=True)


def set_aside(output: Path, step: int) -> None:
    """Rename the checkpoints after `step`, which are damaged, when the run continues from `step`.

    Otherwise they would count as the newest: they would be exported, and good ones would be deleted in their stead.
    """
    for later in steps(output):
        if later > step:
            damaged = folder(output, later)
            aside = damaged.with_name(f"damaged-{damaged.name}")
            shutil.rmtree(aside, ignore_errors=True)
            aside.unlink(missing_ok=True)
            damaged.rename(aside)


def publish(output: Path, source: Path) -> Path:
    """Make OUTPUT/model the model of checkpoint `source`, replacing the previous one in two renames."""
    target, fresh, old = output / "model", output / ".model.partial", output / ".model.old"
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source / "model", fresh)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def _files(path: Path) -> list[str]:
    return [str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()]


def _checksum(path: Path) -> dict:
    crc = size = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
        os.fsync(file.fileno())
    return {"bytes": size, "crc32": crc}


def _write_json(path: Path, value: dict) -> None:
    with open(path, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free_bytes(output: Path) -> int:
    return shutil.disk_usage(output).free


def _is_disk_error(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)
    # torch.save and safetensors raise other errors for a failed write
    words = ("PytorchStreamWriter", "iostream error", "unexpected pos", "write failed")
    if isinstance(error, SafetensorError):
        words = ("I/O error", "IoError", "os error")
    return any(word in str(error) for word in words)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"a write failed, as on a full disk ({first_line(error)})"


def _newest(output: Path) -> str:
    done = steps(output)
    return f"the newest checkpoint is {folder(output, done[0])}" if done else "there is no earlier checkpoint"


def _size(count: float) -> str:
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} bytes"
