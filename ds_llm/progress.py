"""Progress of long steps on rank 0: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ds_llm.distributed import watchdog
from ds_llm.distributed.environment import rank

PLAIN_SECONDS = 5.0  # between lines when the output is not a terminal

# without markup: brackets in paths and texts are no styles
console = Console(highlight=False, soft_wrap=True, markup=False, quiet=rank() != 0)


class Task:
    """A running step: `advance(n)` counts, `done` and `total` are in `unit`s."""

    def __init__(self, title: str, total: float | None, unit: str, bar: Progress | None):
        self.title, self.total, self.unit, self.done = title, total, unit, 0.0
        self._bar, self._start, self._shown = bar, time.monotonic(), time.monotonic()
        self._id = bar.add_task(title, total=total, rate="") if bar else None

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount
        watchdog.alive(self.title)
        rate = f"{_short(self.rate())} {self.unit}/s" + (f"  {note}" if note else "")
        if self._bar:
            self._bar.update(self._id, advance=amount, rate=rate)
        elif time.monotonic() - self._shown >= PLAIN_SECONDS:
            self._shown = time.monotonic()
            console.print(f"{self.title}: {self._counts()}, {rate}{self._eta()}")

    def rate(self) -> float:
        """Units per second since the start."""
        return self.done / max(time.monotonic() - self._start, 1e-9)

    def _counts(self) -> str:
        if not self.total:
            return f"{_short(self.done)} {self.unit}"
        return f"{_short(self.done)}/{_short(self.total)} {self.unit} ({self.done / self.total:.0%})"

    def _eta(self) -> str:
        if not self.total or not self.done:
            return ""
        return f", {duration((self.total - self.done) / self.rate())} left"


@contextmanager
def progress(title: str, total: float | None = None, unit: str = "items"):
    """Show a step of `total` units while the block runs; yields a `Task` to advance.

    On a terminal a bar with rate and remaining time; elsewhere a line every 5 seconds; nothing on ranks other than 0.
    """
    if not console.is_terminal or console.quiet:
        yield Task(title, total, unit, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield Task(title, total, unit, bar)


@contextmanager
def waiting(text: Callable[[float], str]):
    """Show a line while the block, one long call without counts, runs. `text(seconds since the start)` gives the line.

    A block of less than 2 seconds shows nothing. On a terminal the line is live; elsewhere it is printed again every 10
    seconds. Rank 0 only.
    """
    start = time.monotonic()
    live = console.is_terminal and not console.quiet

    def show(over: threading.Event) -> None:
        if over.wait(2):
            return
        with console.status("") if live else nullcontext() as status:
            while True:
                line = text(time.monotonic() - start)
                status.update(line) if live else console.print(line)
                if over.wait(1 if live else 2 * PLAIN_SECONDS):
                    return

    with in_background(show):
        yield


@contextmanager
def in_background(work: Callable[[threading.Event], None]):
    """Run `work` in a thread while the block runs; it must return soon after its event is set, at the block's end."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def duration(seconds: float) -> str:
    """`3 s`, `4:05`, `2:03:04`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _short(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.1f}{suffix}"
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
