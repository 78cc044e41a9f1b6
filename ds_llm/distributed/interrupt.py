"""Asking a run to stop: SIGTERM, SIGINT, or the launcher gone."""

from __future__ import annotations

import os
import signal

import psutil

received = False  # whether this process was asked by a signal
EXIT_CODE = 75  # EX_TEMPFAIL: the run was interrupted after saving; start it again with resume=auto


class Interrupt:
    """Notices a request to stop and lets the loop finish its step and save.

    Signals only set a flag, and repeated ones change nothing: launchers pass a Ctrl-C on as a SIGTERM of their own.
    The launcher dying (it is killed, or its terminal or ssh connection is) counts as a request too, since nobody would
    be left to stop the run.
    """

    def __init__(self):
        self.reason: str | None = None
        self._launcher = _launcher_chain() if "RANK" in os.environ else []
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    def close(self) -> None:
        """Let signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame) -> None:
        global received
        received = True
        self.reason = self.reason or signal.Signals(number).name

    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        if self.reason is None and any(not _same(p) for p in self._launcher):
            self.reason = "the launcher is gone"
        return self.reason is not None


def since_boot(process: psutil.Process) -> float:
    """Seconds from the start of the machine to that of `process`: with its number, what tells it from any other one.

    psutil's start time is of the wall clock as it is now, so that it changes whenever somebody sets that clock.
    """
    return process.create_time() - psutil.boot_time()


def _same(process: psutil.Process) -> bool:
    try:  # is_running also compares start times, so a reused process number is not mistaken for the launcher
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _launcher_chain() -> list[psutil.Process]:
    """The launching process, and the `deepspeed` command above it when there is one."""
    try:
        parent = psutil.Process().parent()
        if parent is None or not any(
            "launch" in a or "torchrun" in a or "torch.distributed" in a for a in parent.cmdline()
        ):
            return []
        above = parent.parent()
        if above is not None and any(a.endswith(("/deepspeed", "/ds")) for a in above.cmdline()[:3]):
            return [parent, above]
        return [parent]
    except psutil.Error:
        return []
