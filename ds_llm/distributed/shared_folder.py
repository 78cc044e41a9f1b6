"""Which ranks share an output folder, and how checkpoints work where machines share none.

Without a shared file system each machine has its own folder at the output's path. The ranks of a machine keep their
part of every checkpoint there, with a manifest. Files of rank 0 that every rank needs are copied to each machine. The
run can continue if each rank finds its part on its machine, or if somebody has copied all parts together.
"""

from __future__ import annotations

import json
import re
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from ds_llm.distributed import watchdog
from ds_llm.distributed.collectives import check_all, gather
from ds_llm.errors import UserError

# the number of a rank in names of DeepSpeed's files (zero_pp_rank_1_...) and of ours (ema_rank00001.pt)
RANK_IN_NAME = re.compile(r"(?<=pp_rank_)\d+|(?<=[a-z]_rank)\d+(?=\.)")
CHUNK = 8 << 20
EXPORTED = "model/"  # the exported model of a checkpoint: only rank 0 writes it, and no run needs it to continue
_known: dict[Path, SharedFolder] = {}


@dataclass
class SharedFolder:
    """A folder and the ranks that share it.

    ranks: those that share it with this rank, ascending. hosts: the host name of every rank of the job.
    """

    ranks: list[int]
    hosts: list[str]

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first that shares the folder; it writes what belongs to the folder as a whole."""
        return dist.get_rank() == self.ranks[0]

    @property
    def by_all(self) -> bool:
        """Whether all ranks share the folder."""
        return len(self.ranks) == len(self.hosts)

    @property
    def index(self) -> int:
        return self.ranks.index(dist.get_rank())


def of(folder: Path, writable: bool = True) -> SharedFolder:
    """Find the ranks that share a folder with this one. Collective; the answer is kept.

    Each rank creates a file there for a moment and looks for those of the others. writable: raise `UserError` where the
    folder cannot be written; otherwise such a folder counts as shared by all.
    """
    path = folder.absolute()
    if path not in _known:
        _known[path] = _find(path, writable)
    return _known[path]


def _find(folder: Path, writable: bool) -> SharedFolder:
    rank, world = dist.get_rank(), dist.get_world_size()
    host = socket.gethostname()
    if world == 1:
        return SharedFolder([0], [host])
    nonce, mine = gather(uuid.uuid4().hex)[0], None
    mark = folder / f".here-{nonce}-{rank}"
    try:
        if writable:
            folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        mine = f"output: {folder}: cannot be written on {host} ({error.strerror})"
    if writable:
        check_all(mine)
    elif any(gather(mine)):
        mark.unlink(missing_ok=True) if mine is None else None
        return SharedFolder(list(range(world)), gather(host))
    try:
        # names with a nonce are new, so that no network file system has a cached answer for them
        seen = [other for other in range(world) if (folder / f".here-{nonce}-{other}").exists()]
        hosts = gather(host)
    finally:
        dist.barrier()
        mark.unlink(missing_ok=True)
    return SharedFolder(seen, hosts)


def common_steps(shared: SharedFolder, own: list[int]) -> list[int]:
    """Steps of the checkpoints that every folder holds, newest first. Collective. own: the steps in this rank's folder.

    Raises `UserError` where there are checkpoints but none is in all folders.
    """
    held = gather(own)
    if shared.by_all:
        return held[0]
    common = set.intersection(*map(set, held))
    if newest := max((step for found in held for step in found), default=0):
        lacking = [shared.hosts[rank] for rank, found in enumerate(held) if newest not in found]
        holding = [shared.hosts[rank] for rank, found in enumerate(held) if newest in found]
        if lacking and not common:
            raise UserError(
                f"output: the machines share no folder, and the checkpoint of step {newest} is on {_names(holding)}, "
                f"not on {_names(lacking)}: start the machines that saved it, or copy its files to all of them"
            )
    return sorted(common, reverse=True)


def check_parts(shared: SharedFolder, path: Path, world: int) -> None:
    """Raise `UserError` that names files of a checkpoint missing on a host. Collective.

    world: number of processes that saved it.
    """
    if dist.get_world_size() == 1:
        return
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        names = [name for name in manifest["files"] if not name.startswith(EXPORTED)]
    except (OSError, ValueError, KeyError):
        manifest, names = {}, []
    found = gather((manifest.get("ranks"), names, [name for name in names if (path / name).is_file()]))
    everything = set().union(*(saved for _, saved, _ in found))
    troubles = []
    for rank, (_, _, present) in enumerate(found):
        together = [set(saved) for ranks, saved, _ in found if world == len(found) and (ranks is None or rank in ranks)]
        missing = sorted((together[0] if together else everything) - set(present))
        if missing:
            others = [shared.hosts[other] for other, (_, _, there) in enumerate(found) if missing[0] in there]
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            troubles.append(f"{shared.hosts[rank]} lacks {missing[0]}{more} (on {_names(others) or 'no machine'})")
    if troubles:
        raise UserError(
            f"{path}: the machines share no folder, and {'; '.join(dict.fromkeys(troubles))}: start them in the order "
            "they had, or copy the files of this folder to all of them"
        )


def serve(folder: Path) -> None:
    """On rank 0: let the other ranks read the files of this folder, and of no other."""
    if (peers := watchdog.peers()) is None:
        return

    def read(rank: int, request: dict, _: bytes) -> tuple[dict, bytes]:
        path = (folder / request["name"]).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise UserError(f"{request['name']}: not in the folder")
        with open(path, "rb") as file:
            file.seek(request["offset"])
            return {}, file.read(CHUNK)

    peers.services["read"] = read


def fetch(name: str, target: Path) -> None:
    """Copy the file `name` of the folder that rank 0 serves to `target`."""
    peers = watchdog.peers()
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as file:
        while data := peers.ask("read", name=name, offset=file.tell())[1]:
            file.write(data)


def complete(shared: SharedFolder, partial: Path, names: Callable[[Path], list[str]]) -> None:
    """Copy rank 0's files that every rank needs to the other folders. Collective. names: lists the files of a folder.

    These are the files without a counterpart of another rank in that folder.
    """
    if shared.by_all:
        return
    if watchdog.peers() is None:
        raise UserError("output: the machines share no folder; start the run by launch/train.py, or share one")
    rank = dist.get_rank()
    if rank == 0:
        serve(partial)
    offered = gather(names(partial) if rank == 0 else None)[0]
    trouble = None
    if shared.is_first and rank:
        held = {RANK_IN_NAME.sub("#", name) for name in names(partial)}
        for name in offered:
            if not name.startswith(EXPORTED) and RANK_IN_NAME.sub("#", name) not in held:
                try:
                    fetch(name, partial / name)
                except OSError as error:
                    trouble = f"{partial / name}: cannot be written on {shared.hosts[rank]} ({error.strerror})"
    check_all(trouble)


def _names(hosts: list[str]) -> str:
    return ", ".join(dict.fromkeys(hosts))
