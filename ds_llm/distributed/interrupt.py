"""Requests to stop a run: SIGTERM, SIGINT, or the death of its launcher."""

from __future__ import annotations

import os
import signal

import psutil

received = False  # whether a signal asked this process to stop
EXIT_CODE = 75  # EX_TEMPFAIL: the run was interrupted after saving; start it again with resume=auto


class Interrupt:
    """Notices a request to stop, so that the loop can finish its step and save.

    A signal only sets a flag, and repeated signals change nothing: launchers pass a Ctrl-C on as a SIGTERM. The death
    of the launcher, its terminal or its ssh connection counts as a request too: nobody else could stop the run.
    """

    def __init__(self):
        self.reason: str | None = None
        self._launcher = _launcher_chain() if "RANK" in os.environ else []
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    def close(self) -> None:
        """Restore the former signal handlers."""
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
    """Seconds from the start of the machine to the start of `process`; with the process number it is unique.

    psutil's own start time follows the wall clock and changes whenever somebody sets that clock.
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
