"""Coordinates the ranks of a scoring run without collectives: rank 0 announces stages, the others report progress.

Messages use the connections of `ds_llm.distributed.heartbeat`. A rank whose machine does not see rank 0's folder
fetches the files that it needs from rank 0 and sends its scores there batch by batch, so that all parts are with rank
0.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from ds_llm.distributed import shared_folder, watchdog
from ds_llm.distributed.heartbeat import Peers
from ds_llm.distributed.interrupt import EXIT_CODE
from ds_llm.errors import UserError
from ds_llm.scoring.parts import Part

CHECK_SECONDS, POLL_SECONDS = 0.5, 0.1
STAGES = ("started", "indexed", "ready", "finished")
MARK = ".here"  # file in rank 0's folder that shows a rank whether it sees that folder
COPIED = "of-rank-0"  # folder for copies, on a machine that does not see it


class Elsewhere(UserError):
    """Another rank has failed or is lost."""


class Ranks:
    """All ranks of a scoring run, as one of them sees them. progress: this rank's own, sent to rank 0.

    peers: the connections; None for one process. stop: returns the reason why this process was asked to stop, or None;
    with a reason `check` raises `UserError`. Waiting and checking raise `Elsewhere` where the job must end.
    """

    def __init__(self, peers: Peers | None, folder: Path, stop: Callable[[], str | None] = lambda: None):
        self.peers, self.folder, self._stop = peers, folder, stop
        self.rank, self.count = (peers.rank, peers.world) if peers else (0, 1)
        self.progress = {"rows": 0, "tokens": 0, "done": False}
        self.shared = True  # whether this rank sees the folder of rank 0
        self._checked = 0.0
        self._mark = uuid.uuid4().hex
        self._parts: dict[int, Part] = {}
        if peers is None:
            return
        peers.own |= {"stage": STAGES[0], "content": {}, "progress": self.progress}
        if self.rank == 0:
            (folder / MARK).write_text(self._mark)
            shared_folder.serve(folder)
            peers.services["append"] = self._append

    def close(self) -> None:
        """Release what only a running job needs."""
        for part in self._parts.values():
            part.close()

    # -- rank 0 -------------------------------------------------------------------------------------------------------

    def announce(self, stage: str, **content) -> None:
        """Announce `stage` and its content to all ranks."""
        if self.peers is not None:
            self.peers.own |= {"content": {**content, "mark": self._mark}}
            self.peers.own["stage"] = stage

    def wait_for_all(self, show: Callable[[], None]) -> None:
        """Wait until every rank has done its share; calls `show()` from time to time."""
        watchdog.waiting("waiting for the other ranks")
        while not all(self._others(number).get("done") for number in range(1, self.count)):
            self.check(force=True)
            show()
            time.sleep(POLL_SECONDS)

    def totals(self) -> tuple[int, int]:
        """Rows and tokens that all ranks have scored in this launch."""
        states = [self.progress, *map(self._others, range(1, self.count))]
        return tuple(sum(state.get(name, 0) for state in states) for name in ("rows", "tokens"))

    def _others(self, number: int) -> dict:
        return self.peers.states.get(number, {}).get("progress", {})

    def receive(self, part: Callable[[int], Part]) -> None:
        """Accept the scores of ranks that do not see the folder. part: opens the part of a rank."""
        self._open = part

    def _append(self, rank: int, what: dict, payload: bytes) -> tuple[dict, bytes]:
        if rank not in self._parts:
            self._parts[rank] = self._open(rank)
        self._parts[rank].append(int(what["batch"]), payload)
        return {}, b""

    # -- the other ranks ----------------------------------------------------------------------------------------------

    def wait_for(self, stage: str) -> tuple[str, dict]:
        """Wait until rank 0 has announced `stage` or a later one. Returns the stage and its content."""
        watchdog.waiting(f"waiting for rank 0 ({stage})")
        while True:
            zero = self.peers.states.get(0, {})
            if STAGES.index(zero.get("stage", STAGES[0])) >= STAGES.index(stage):
                self._mark = zero["content"]["mark"]
                self.shared = self._has(self.folder / MARK)
                return zero["stage"], zero["content"]
            self.check(force=True)
            self.peers.poke()
            time.sleep(POLL_SECONDS)

    def fetch(self, names: list[str]) -> Path:
        """A folder with these files of rank 0: its own, or a copy that the ranks of a machine share."""
        if self.shared:
            return self.folder
        folder = self.folder / COPIED
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                whole = folder / f".whole-{names[0].replace('/', '-')}"
                if not self._has(whole):
                    watchdog.doing("fetching from rank 0")
                    for name in names:
                        shared_folder.fetch(name, folder / name)
                    whole.write_text(self._mark)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})", any_rank=True) from None
        return folder

    def _has(self, mark: Path) -> bool:
        try:
            return mark.read_text() == self._mark
        except FileNotFoundError:
            return False

    def forget(self) -> None:
        """Remove the copies that `fetch` made."""
        if not self.shared:
            shutil.rmtree(self.folder / COPIED, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    # -- all ----------------------------------------------------------------------------------------------------------

    def check(self, force: bool = False) -> None:
        """Raise with the reason where the run cannot succeed. Cheap: it looks at most twice a second."""
        if not force and time.monotonic() - self._checked < CHECK_SECONDS:
            return
        self._checked = time.monotonic()
        reason = self._stop()
        if reason and self.peers:
            time.sleep(POLL_SECONDS)  # a launcher stops all ranks when one has died, and that is the reason to name
        verdict = self.peers.verdict if self.peers else None
        if verdict is not None and verdict.kind != "hang":  # which is reported with the stacks
            again = "; run the same command again to continue" if verdict.kind == "lost" else ""
            raise Elsewhere(f"{verdict.text}{again}", any_rank=verdict.own)
        if reason:
            raise UserError(f"interrupted ({reason}); run the same command again to continue", exit_code=EXIT_CODE)


class RemotePart:
    """A part that rank 0 writes for a rank that does not see its folder; like `parts.Part`."""

    def __init__(self, peers: Peers):
        self._peers = peers

    def append(self, batch: int, payload: bytes) -> None:
        self._peers.ask("append", payload, batch=batch)

    def close(self) -> None:
        """Rank 0 does."""
