"""Deals the batches of an evaluation over ranks; the figures do not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ds_llm.engine import processes
from ds_llm.engine.engine import Engine
from ds_llm.progress import progress


def deal(engine: Engine, count: int, title: str) -> Iterator[tuple[int, bool]]:
    """Of `count` batches, the numbers of those that this rank runs, each with whether its result counts.

    Every rank gets equally many, so that none waits for another in a collective: a rank left over repeats the last
    batch, which does not count.
    """
    layout = engine.layout
    with progress(title, total=count, unit="batches") as task:
        for first in range(0, count, layout.replicas):
            mine = first + layout.replica
            yield min(mine, count - 1), mine < count and layout.counts
            task.advance(min(layout.replicas, count - first))


def measure(
    engine: Engine, batches: Sequence, figures: Callable[..., Sequence[float]], width: int, title: str = "evaluating"
) -> np.ndarray:
    """The `width` figures of each batch, float64 [batches, width], the same on every rank; collective.

    figures: an item of `batches` -> its figures, such as sums over its rows.
    """
    table = np.zeros((len(batches), width))
    for number, counts in deal(engine, len(batches), title):
        found = figures(batches[number])
        if counts:
            table[number] = found
    return np.array(processes.all_reduce(table.ravel().tolist())).reshape(table.shape)
