"""How the ranks of a scoring run know of each other: small files that each rewrites, and no collective.

In the folder `ranks/`, each rank r > 0 keeps `rank-<r>.json` (a name for this launch, process, beat, progress, failure)
and rank 0 keeps `rank-0.json`, which also says which of the others it has seen, by that name, and how far the run is.
A file whose name for the launch rank 0 has not repeated is of no consequence, so what killed runs left behind misleads
nobody. A process whose beat stands still, or that is gone from the same machine, ends the run for all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from ds_llm.errors import UserError
from ds_llm.interrupt import EXIT_CODE, since_boot

BEAT_SECONDS, POLL_SECONDS = 0.5, 0.1
SILENCE_SECONDS = 120.0  # without a beat until a rank counts as gone; file systems of clusters show changes late
START_SECONDS = 300.0  # for all ranks of a launch to appear
STAGES = ("started", "indexed", "ready", "finished")


class Elsewhere(UserError):
    """Another rank has failed or is gone."""


class Ranks:
    """One rank's view of all; a context manager. progress: what this rank has done, shown to the others.

    stop: says why this process was asked to stop, or None; then `check` raises `UserError`. Waiting and checking raise
    `Elsewhere` when another rank has failed or is gone.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, stop: Callable[[], str | None] = lambda: None):
        self.folder, self.rank, self.count, self._stop = folder, rank, ranks, stop
        self.progress = {"rows": 0, "tokens": 0, "done": False}
        process = psutil.Process()
        self._own = {
            "name": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": process.pid,
            "started": since_boot(process),
            "stage": STAGES[0],
            "seen": {},
            "failed": None,
            "beat": 0,
        }
        self._heard: dict[int, tuple[int, float]] = {}  # of each rank the last beat and when it was first seen
        self._content: dict = {}
        self._begin, self._checked = time.monotonic(), 0.0
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self):
        if self.count > 1:
            if self.rank == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
            self._write()
            self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.count == 1:
            return
        if error is not None:
            self._own["failed"] = str(error) if isinstance(error, UserError) else f"{kind.__name__}: {error}"
        elif self.rank:
            self.progress["left"] = True
        else:
            self._see_off()
        self._over.set()
        self._thread.join()
        self._write()
        if error is None and self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _see_off(self) -> None:
        """Rank 0: stay until every other rank knows that the run is over, also one that is only starting now."""
        with contextlib.suppress(Elsewhere):  # one that is gone, or never came, is not waited for
            while True:
                others = enumerate(self._others(), 1)
                waiting = [(n, state) for n, state in others if not state.get("progress", {}).get("left")]
                if not waiting:
                    return
                for number, state in waiting:
                    self._check(number, state or None, None)
                time.sleep(POLL_SECONDS)

    def announce(self, stage: str, **content) -> None:
        """Rank 0: tell all that the run is at `stage`, and what they need for it."""
        self._own["stage"], self._content = stage, content
        if self.count > 1:
            self._write()

    def wait_for(self, stage: str) -> tuple[str, dict]:
        """Other ranks: wait until rank 0 has announced `stage` or a later one; returns which, and what it told."""
        while True:
            zero = self._zero()
            if zero is not None and STAGES.index(zero["stage"]) >= STAGES.index(stage):
                return zero["stage"], zero["content"]
            self.check(force=True)
            time.sleep(POLL_SECONDS)

    def wait_for_all(self, show) -> None:
        """Rank 0: wait until every rank has done its share, with `show()` now and then."""
        while not all(o.get("progress", {}).get("done") for o in self._others()):
            self.check(force=True)
            show()
            time.sleep(POLL_SECONDS)

    def totals(self) -> tuple[int, int]:
        """Rank 0: rows and tokens that all ranks have scored in this launch."""
        states = [{"progress": self.progress}, *self._others()]
        return tuple(sum(s.get("progress", {}).get(name, 0) for s in states) for name in ("rows", "tokens"))

    def check(self, force: bool = False) -> None:
        """Raise `Elsewhere` with the reason when the run cannot end well; cheap, looks at most once per beat."""
        if not force and time.monotonic() - self._checked < BEAT_SECONDS:
            return
        self._checked = time.monotonic()
        if reason := self._stop():
            raise UserError(f"interrupted ({reason}); run the same command again to continue", exit_code=EXIT_CODE)
        if self.rank:
            self._check(0, self._zero(), None)
        else:
            for number, state in enumerate(self._others(), 1):
                self._check(number, state or None, state.get("progress"))

    def _check(self, number: int, state: dict | None, progress: dict | None) -> None:
        now = time.monotonic()
        if state is None:
            if now - self._begin > START_SECONDS:
                raise Elsewhere(
                    f"rank {number} did not show in {self.folder} within {START_SECONDS:.0f} s; do all machines see "
                    "this folder, and did it start?",
                    any_rank=True,
                )
            return
        where = f"rank {number} ({state['host']}, process {state['pid']})"
        if state["failed"]:
            raise Elsewhere(f"rank {number} failed: {state['failed']}")
        if progress and progress.get("done"):
            return
        beat, since = self._heard.get(number, (None, now))
        if beat != state["beat"]:
            beat, since = state["beat"], now
        self._heard[number] = (beat, since)
        if state["host"] == self._own["host"] and not _alive(state):
            raise Elsewhere(f"{where} is gone; run the same command again to continue", any_rank=number == 0)
        if now - since > SILENCE_SECONDS:
            raise Elsewhere(
                f"{where} gave no sign of life for {SILENCE_SECONDS:.0f} s; run the same command again to continue",
                any_rank=number == 0,
            )

    def _zero(self) -> dict | None:
        """What rank 0 says, once it has seen this rank in this launch."""
        state = self._read(0)
        return state if state and state["seen"].get(str(self.rank)) == self._own["name"] else None

    def _others(self) -> list[dict]:
        """Of each other rank what it says, empty until it has shown."""
        states = [self._read(number) or {} for number in range(1, self.count)]
        return [s if s and self._own["seen"].get(str(n)) == s["name"] else {} for n, s in enumerate(states, 1)]

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            self._own["beat"] += 1
            self._write()

    def _write(self) -> None:
        with self._lock:
            if self.rank == 0:
                for number in range(1, self.count):  # the newest name of each: only a living process writes one
                    if state := self._read(number):
                        self._own["seen"][str(number)] = state["name"]
            data = json.dumps({**self._own, "progress": self.progress, "content": self._content})
            path = self.folder / f"rank-{self.rank}.json"
            scratch = path.with_suffix(".tmp")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                scratch.write_text(data)
                os.replace(scratch, path)
            except FileNotFoundError:
                pass  # rank 0 is clearing the folder; the next beat writes again
            except OSError as error:
                if threading.current_thread() is not self._thread:  # which has nobody to tell, and tries again
                    raise UserError(f"{path}: cannot be written ({error.strerror})", any_rank=True) from None

    def _read(self, number: int) -> dict | None:
        try:
            return json.loads((self.folder / f"rank-{number}.json").read_bytes())
        except (OSError, ValueError):
            return None


def _alive(state: dict) -> bool:
    try:
        process = psutil.Process(state["pid"])
        return abs(since_boot(process) - state["started"]) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
