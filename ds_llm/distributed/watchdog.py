"""Ends a job that hangs or has lost a process, and reports which rank and where.

`guard` is open while a job runs. Each process records what it is doing (`doing`, `timed`). A background thread compares
that with the clock, and `ds_llm.distributed.heartbeat` sends it to rank 0. On a hang each rank prints what it was doing
and its Python stacks to standard error and exits with code 1. It also exits when another rank is lost or has failed and
the main thread does not end by itself, since that may be stuck in a collective.

Only `timed` work can hang: training steps, and evaluation and scoring from one batch to the next. Preparing, loading,
compiling and saving have no limit, and while one rank does these no rank counts as hanging. Heartbeats always run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from ds_llm.distributed.environment import rank, world_size
from ds_llm.distributed.heartbeat import BEAT_SECONDS, Peers, Verdict
from ds_llm.errors import UserError, first_line, say

# parts of the errors that gloo and NCCL raise when a peer has ended
LOST_PEER = ("onnection closed by peer", "onnection reset by peer", "roken pipe", "remote process exited")
FIRST_SECONDS = 1800.0  # least limit for the first timed work, in which kernels are compiled
GRACE_SECONDS = {"lost": 3.0, "failed": 15.0, "hang": 0.0}  # within which the main thread may end by itself
REPORT_SECONDS = 3.0  # within which the other ranks print their stacks
SILENT_SECONDS = 2.5 * BEAT_SECONDS  # a rank silent for longer is not only late
OWN_THREADS = re.compile(
    r"heartbeat.py\", line \d+ in (_serve|_follow|_await_all)$| in (stacks|serve_forever)$", re.MULTILINE
)
WORKING, TIMED, WAITING = "working", "timed", "waiting"
AGAIN = "the same command continues"

_watch: Watch | None = None


class Watch:
    """What this process is doing and since when, and the thread that watches it.

    hang_seconds: limit for timed work without progress; 0: no limit. key: name of the option with this limit.
    """

    def __init__(self, hang_seconds: float, key: str, peers: Peers | None):
        self.hang_seconds, self.key, self.peers = hang_seconds, key, peers
        self.work, self.mode, self.age, self.finished = "starting", WORKING, 0.0, 0
        self._tick = min(1.0, hang_seconds / 10) if hang_seconds else 1.0
        self._over, self._speaking = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def note(self, work: str | None = None, mode: str | None = None, finished: bool = False) -> None:
        """Record work: its name and mode (None: as before), and whether timed work before it is finished."""
        changed = mode not in (None, self.mode)
        self.work, self.mode = work or self.work, mode or self.mode
        self.age, self.finished = 0.0, self.finished + finished
        if self.peers is not None:
            self.peers.own |= {"doing": self.work, "mode": self.mode}
            if changed:
                self.peers.poke()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def speak(self) -> bool:
        """True for the first caller only, which reports why the job ends."""
        return self._speaking.acquire(blocking=False)

    def limit(self) -> float:
        return self.hang_seconds if self.finished else max(self.hang_seconds, FIRST_SECONDS)

    def _run(self) -> None:
        before, grace = time.monotonic(), None
        while not self._over.wait(self._tick):
            now = time.monotonic()
            self.age += min(now - before, 2 * self._tick)  # time suspended does not count
            before = now
            if self.hang_seconds and sys.__stderr__ is not None:
                # this C thread reports even where code that holds the GIL stops this Python thread
                faulthandler.dump_traceback_later(self.limit() + 60, file=sys.__stderr__)
            hung = bool(self.hang_seconds and self.mode == TIMED and self.age > self.limit())
            verdict = self._consult(hung)
            if verdict is None:
                continue
            grace = GRACE_SECONDS[verdict.kind] if grace is None else grace - self._tick
            if grace <= 0:
                self._end(verdict)

    def _consult(self, hung: bool) -> Verdict | None:
        peers = self.peers
        if peers is None:
            return Verdict("hang", 0, "") if hung else None
        peers.own |= {"age": round(self.age, 1), "hung": hung}
        if peers.verdict is not None:
            return peers.verdict
        over = self.age - self.limit()
        if rank() == 0:
            states = [peers.own, *peers.states.values()]
            excused = any(state.get("mode") == WORKING for state in states)
            # a little later than the limit, because the other ranks find the same about now
            if any(s.get("hung") for s in states) and not excused and (over > 2 * self._tick or not hung):
                peers.end("hang", "")
        elif hung:
            peers.poke()
            zero = peers.states.get(0, {})
            if zero.get("mode") != WORKING and peers.silent(0) > 2 * SILENT_SECONDS:  # it may be what hangs
                return Verdict("hang", rank(), "")
        return peers.verdict

    def _end(self, verdict: Verdict) -> None:
        if verdict.kind == "hang":
            self._report(verdict)
        elif verdict.own and self.speak():
            _say(f"error: {_line(verdict)}\n")
        if rank() == 0 and self.peers is not None:
            self.peers.leave()  # returns when all ranks know the verdict
        _stop_silent_neighbours(self.peers)
        sys.stdout.flush()
        os._exit(1)

    def _report(self, verdict: Verdict) -> None:
        peers = self.peers
        me = peers.name(rank()) if peers else f"process {os.getpid()}"
        if verdict.own:
            lines = [f"no progress within {self.hang_seconds:g} s ({self.key})"]
            for number in sorted({rank(), *(peers.states if peers else ())}):
                state = peers.states.get(number) if number != rank() else None
                work = f"{self.work}, for {self.age:.0f} s" if state is None else _seen(state, peers.silent(number))
                lines.append(f"  {me if number == rank() else peers.name(number)}: {work}")
            _say("\n".join(lines) + "\n")
        _say(f"{me} in {self.work}:\n{stacks()}\n")
        if verdict.own and self.speak():
            if peers and rank() == 0:
                time.sleep(REPORT_SECONDS)
            _say(
                f"error: ended, no progress within {self.hang_seconds:g} s ({self.key}): look at the stacks, first of "
                f"a rank that is elsewhere than the others; {AGAIN}. If the work takes that long, raise {self.key}\n"
            )
        elif rank():
            time.sleep(REPORT_SECONDS)  # the launcher ends the job with the first process that ends


def _line(verdict: Verdict) -> str:
    return f"{verdict.text}; {AGAIN}" if verdict.kind == "lost" else verdict.text


def _seen(state: dict, silent: float) -> str:
    since = f"silent for {silent:.0f} s, last in " if silent > SILENT_SECONDS else ""
    return f"{since}{state.get('doing', 'starting')}, for {state.get('age', 0) + silent:.0f} s"


def stacks() -> str:
    """The Python stacks of this process, without those of the watching threads; the main thread comes last."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        threads = file.read().strip().split("\n\n")
    return "\n\n".join(thread for thread in threads if not OWN_THREADS.search(thread))


def _say(text: str) -> None:
    """Write to standard error in one call, so that lines of several processes do not mix."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _stop_silent_neighbours(peers: Peers | None) -> None:
    """Kill silent ranks on this machine: a stopped process (SIGSTOP) does not get the launcher's SIGTERM."""
    if peers is None or rank():
        return
    for number, state in peers.states.items():
        if state["host"] == peers.own["host"] and number in peers.stuck():
            with contextlib.suppress(OSError):
                os.kill(state["pid"], signal.SIGKILL)


@contextlib.contextmanager
def guard(hang_seconds: float, lost_seconds: float, section: str) -> Iterator[Peers | None]:
    """Watch this process and all others of the job while the block runs; yields its `Peers`, None for one process.

    hang_seconds, lost_seconds: the keys `hang_timeout` and `lost_timeout` in `section` of the configuration. An error
    that ends the block ends the job for the other ranks too, with its reason.
    """
    global _watch
    peers = Peers(rank(), world_size(), lost_seconds) if world_size() > 1 else None
    if peers is not None:
        peers.start()
    watch = _watch = Watch(hang_seconds, f"{section}.hang_timeout", peers)
    watch.start()
    failed = "it ended early"
    try:
        yield peers
        failed = None
    except UserError as error:
        failed = str(error)
        if rank() == 0 or error.any_rank:
            say(error)  # before the other ranks know: the first that exits makes the launcher end this one
        raise
    except RuntimeError as error:
        failed = first_line(error)
        if peers is None or not any(words in str(error) for words in LOST_PEER):
            raise
        verdict = _verdict(peers)
        if verdict is None:
            raise
        if not (verdict.own and watch.speak()):  # already reported
            sys.exit(1)
        raise UserError(_line(verdict), any_rank=True) from error
    except SystemExit as error:
        failed = None if not error.code else failed
        raise
    except BaseException as error:
        failed = f"{type(error).__name__}: {error}"
        raise
    finally:
        watch.stop()
        if peers is not None:
            peers.leave(failed)
        _watch = None


def _verdict(peers: Peers) -> Verdict | None:
    """Wait up to 5 seconds for the reason why a connection to another rank broke; None where none arrives."""
    end = time.monotonic() + 5
    while peers.verdict is None and time.monotonic() < end:
        peers.poke()
        time.sleep(0.1)
    return peers.verdict


def doing(work: str) -> None:
    """Record the start of work without a time limit, for which other ranks may have to wait."""
    if _watch is not None:
        _watch.note(work, WORKING)


def timed(work: str, finished: bool = False) -> None:
    """Record the start of work that must show progress. finished: the timed work before it is done."""
    if _watch is not None:
        _watch.note(work, TIMED, finished)


def waiting(work: str) -> None:
    """Record that this process waits for other ranks."""
    if _watch is not None:
        _watch.note(work, WAITING)


def alive(work: str | None = None) -> None:
    """Record progress in the current work, and its name where one is given."""
    if _watch is not None:
        _watch.note(work)


@contextlib.contextmanager
def during(work: str) -> Iterator[None]:
    """`doing` while the block runs; then the work before it continues."""
    watch = _watch
    before = (watch.work, watch.mode) if watch is not None else ()
    doing(work)
    try:
        yield
    finally:
        if watch is not None:
            watch.note(*before)


def peers() -> Peers | None:
    """The other processes of the job; None outside of `guard` and in a job of one process."""
    return _watch.peers if _watch is not None else None


def watched() -> bool:
    """Whether a lost rank ends this process, so that collectives need no time limit."""
    return _watch is not None and _watch.peers is not None
