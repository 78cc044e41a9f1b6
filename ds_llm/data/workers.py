"""Processes input files in worker processes, with results in the order of the input."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from ds_llm.data.files import InputFile, Position, read
from ds_llm.errors import UserError
from ds_llm.progress import progress


def available_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process(
    title: str, sources: list[InputFile], state: dict, make: Callable, arguments: tuple, workers: int, batch_bytes: int
) -> Iterator[tuple[Path, Any]]:
    """Yield (file, result) for each batch of the sources, see `ordered`, and show the progress.

    state: `position` says where to begin and, like `disk` (bytes of the sources read so far), is moved behind each
    batch before its result is yielded.
    """
    state.setdefault("position", [0, 0, 0])
    state.setdefault("disk", 0)
    batches = read(sources, Position(*state["position"]), batch_bytes)
    left = sum(file.size for file in sources) - state["disk"]
    with progress(f"{title} (continued)" if state["disk"] else title, left / 1e6, "MB") as task:
        for batch, result in ordered(make, arguments, batches, workers):
            state["position"] = [batch.after.file, batch.after.record, batch.after.offset]
            state["disk"] += batch.disk
            yield sources[batch.file].path, result
            task.advance(batch.disk / 1e6)


def ordered(make: Callable[..., Callable], arguments: tuple, batches: Iterable, workers: int) -> Iterator[tuple]:
    """Yield (batch, result) in the order of `batches`; each worker builds its function once, by `make(*arguments)`.

    make: a module-level function in a module with few imports, since workers are fresh interpreters. One worker means
    this process. At most four batches per worker are in progress, which bounds the memory. Raises `UserError` where a
    worker dies. Workers end with this process, however it ends.
    """
    if workers <= 1:
        function = make(*arguments)
        for batch in batches:
            yield batch, function(batch)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (make, arguments))
    waiting: deque = deque()
    try:
        for batch in batches:
            waiting.append((batch, _submit(pool, batch)))
            if len(waiting) >= 4 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (out of memory?); run the same command again to continue, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, batch):
    """Submit a batch, with Ctrl-C held back meanwhile, since this may start workers.

    A worker that starts now inherits the blocked signal and leaves the interrupt to its parent. Blocking the signal is
    not enough: another thread, such as the progress bar's, may receive it, and Python then interrupts this thread while
    a worker is only half started.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        return pool.submit(_call, batch)
    interrupts: list[tuple] = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: interrupts.append(arguments))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.submit(_call, batch)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if interrupts and callable(handler):
            handler(*interrupts[0])


_function: Callable[[Any], Any] | None = None


def _start(make: Callable, arguments: tuple) -> None:
    global _function
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = make(*arguments)


def _end_with_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _call(batch):
    return _function(batch)
