"""Which ranks see the same output folder, and what that means for checkpoints.

Where machines share no file system, the output's path is a folder of its own on each of them. Its ranks keep their part
of every checkpoint there, with a manifest of its own; what all ranks need of what only rank 0 writes is copied from it.
Such a run continues as long as each rank finds its part where it starts, or all parts have been brought together.
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
EXPORTED = "model/"  # of a checkpoint: rank 0's alone, and not needed to continue
_known: dict[Path, Place] = {}


@dataclass
class Place:
    """The folder of this rank. ranks: those that share it, in order; hosts: the machine of every rank of the job."""

    ranks: list[int]
    hosts: list[str]

    @property
    def keeps(self) -> bool:
        """Whether this rank is the one that looks after the folder."""
        return dist.get_rank() == self.ranks[0]

    @property
    def alone(self) -> bool:
        """Whether all ranks share one folder."""
        return len(self.ranks) == len(self.hosts)

    @property
    def index(self) -> int:
        return self.ranks.index(dist.get_rank())


def of(folder: Path, writable: bool = True) -> Place:
    """Who shares a folder with this rank. Collective; found out once, by files that each rank puts there for a moment.

    writable: `UserError` where it cannot be written; else such a folder is taken for one that all share.
    """
    path = folder.absolute()
    if path not in _known:
        _known[path] = _find(path, writable)
    return _known[path]


def _find(folder: Path, writable: bool) -> Place:
    rank, world = dist.get_rank(), dist.get_world_size()
    host = socket.gethostname()
    if world == 1:
        return Place([0], [host])
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
        return Place(list(range(world)), gather(host))
    try:
        # each asks for names that nobody has asked for: a network file system has no old answer to them
        seen = [other for other in range(world) if (folder / f".here-{nonce}-{other}").exists()]
        hosts = gather(host)
    finally:
        dist.barrier()
        mark.unlink(missing_ok=True)
    return Place(seen, hosts)


def common_steps(place: Place, own: list[int]) -> list[int]:
    """Checkpoints that every folder holds, newest first; own: those in this rank's. Collective.

    `UserError` when there are some, but none that all folders hold.
    """
    held = gather(own)
    if place.alone:
        return held[0]
    common = set.intersection(*map(set, held))
    if newest := max((step for found in held for step in found), default=0):
        lacking = [place.hosts[rank] for rank, found in enumerate(held) if newest not in found]
        holding = [place.hosts[rank] for rank, found in enumerate(held) if newest in found]
        if lacking and not common:
            raise UserError(
                f"output: the machines share no folder, and the checkpoint of step {newest} is on {_names(holding)}, "
                f"not on {_names(lacking)}: start the machines that saved it, or copy its files to all of them"
            )
    return sorted(common, reverse=True)


def check_parts(place: Place, path: Path, world: int) -> None:
    """Raise `UserError` with what of a checkpoint is missing where. Collective; world: processes that saved it."""
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
            others = [place.hosts[other] for other, (_, _, there) in enumerate(found) if missing[0] in there]
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            troubles.append(f"{place.hosts[rank]} lacks {missing[0]}{more} (on {_names(others) or 'no machine'})")
    if troubles:
        raise UserError(
            f"{path}: the machines share no folder, and {'; '.join(dict.fromkeys(troubles))}: start them in the order "
            "they had, or copy the files of this folder to all of them"
        )


def serve(folder: Path) -> None:
    """Rank 0: let the others read the files of a folder, until it is another one."""
    if (peers := watchdog.peers()) is None:
        return

    def read(rank: int, what: dict, _: bytes) -> tuple[dict, bytes]:
        path = (folder / what["name"]).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise UserError(f"{what['name']}: not in the folder")
        with open(path, "rb") as file:
            file.seek(what["offset"])
            return {}, file.read(CHUNK)

    peers.services["read"] = read


def fetch(name: str, target: Path) -> None:
    """Copy a file of the folder that rank 0 serves."""
    peers = watchdog.peers()
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as file:
        while data := peers.ask("read", name=name, offset=file.tell())[1]:
            file.write(data)


def complete(place: Place, partial: Path, names: Callable[[Path], list[str]]) -> None:
    """Copy to every other folder what rank 0 wrote for all. Collective; names: lists the files of a folder.

    That is each file that has no counterpart there, of another rank.
    """
    if place.alone:
        return
    if watchdog.peers() is None:
        raise UserError("output: the machines share no folder; start the run by launch/train.py, or share one")
    rank = dist.get_rank()
    if rank == 0:
        serve(partial)
    offered = gather(names(partial) if rank == 0 else None)[0]
    trouble = None
    if place.keeps and rank:
        held = {RANK_IN_NAME.sub("#", name) for name in names(partial)}
        for name in offered:
            if not name.startswith(EXPORTED) and RANK_IN_NAME.sub("#", name) not in held:
                try:
                    fetch(name, partial / name)
                except OSError as error:
                    trouble = f"{partial / name}: cannot be written on {place.hosts[rank]} ({error.strerror})"
    check_all(trouble)


def _names(hosts: list[str]) -> str:
    return ", ".join(dict.fromkeys(hosts))
