"""A rank's loop over its batches: forward passes, records, smaller passes where the memory does not suffice."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch

from ds_llm.distributed import watchdog
from ds_llm.distributed.environment import rank, world_size
from ds_llm.errors import UserError
from ds_llm.scoring import batches as plan
from ds_llm.scoring.batches import Plan
from ds_llm.scoring.coordination import Ranks
from ds_llm.scoring.index import Index
from ds_llm.scoring.metrics import Sample
from ds_llm.scoring.parts import Part

CPU_TOKENS = 4096  # auto on a CPU, where larger passes are no faster
SHARED_TOKENS = 8192  # auto where ranks pass through the model together, and trying out could stall the others


def schema(scorer) -> pa.Schema:
    """Of the records that a scorer's rows make."""
    return pa.schema([*scorer.columns.items(), ("error", pa.string())])


class Worker:
    """This rank's share of the batches `missing`."""

    def __init__(self, scorer, index: Index, batches: Plan, missing: np.ndarray):
        self.scorer, self.index, self.batches, self.missing = scorer, index, batches, missing
        self.shares = plan.assign(batches, missing, world_size())
        self.share = self.shares[rank()]
        self.most: int | None = None  # tokens of a pass, once memory has not sufficed
        self._schema = schema(scorer)

    @property
    def imbalance(self) -> float:
        """Excess of the most loaded rank over the mean estimated cost; 0 is even."""
        loads = [float(self.batches.padded[share].sum()) for share in self.shares]
        return max(loads) / max(1e-9, sum(loads) / len(loads)) - 1

    def run(self, part: Part, ranks: Ranks, show: Callable[[], None] = lambda: None) -> None:
        """Score this rank's share, with a record in `part` per batch; reports to `ranks` between passes."""
        watchdog.timed("scoring")
        steps = max(map(len, self.shares)) if self.scorer.collective else len(self.share)
        for step in range(steps):
            ranks.check()
            if step >= len(self.share):
                self.scorer.idle()
                watchdog.timed("scoring", finished=True)
                continue
            batch = int(self.share[step])
            rows = self.batches.rows(self.index, batch)
            found = self._score(self.index.samples(rows), rows)
            columns = [_column([row.get(field.name) for row in found], field.type) for field in self._schema]
            part.append(batch, pa.RecordBatch.from_arrays(columns, schema=self._schema).serialize().to_pybytes())
            ranks.progress["rows"] += len(rows)
            ranks.progress["tokens"] += int(self.batches.tokens[batch])
            watchdog.timed("scoring", finished=True)
            show()

    def _score(self, samples: list[Sample], rows: np.ndarray) -> list[dict]:
        """Scores of samples; halves a pass that does not fit the memory, and all later ones of that size."""
        longest = max(map(len, samples))
        if len(samples) > 1 and self.most is not None and longest * len(samples) > self.most:
            middle = len(samples) // 2
            return self._score(samples[:middle], rows[:middle]) + self._score(samples[middle:], rows[middle:])
        found = attempt(self.scorer, samples)
        if found is not None:
            return found
        if self.scorer.collective:  # the others would wait in vain for a pass that only this rank repeats in halves
            raise UserError("too little memory for a forward pass; give score.tokens_per_batch a smaller number")
        if len(samples) == 1:
            raise UserError(
                f"too little memory for the row with idx {rows[0]} ({longest:,} tokens) by itself; set a smaller "
                "score.max_length, or shard the weights with score.zero3=true"
            )
        self.most = longest * len(samples) // 2
        return self._score(samples, rows)


def _column(values: list, kind: pa.DataType) -> pa.Array:
    if isinstance(kind, pa.FixedShapeTensorType):
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(values))
    return pa.array(values, kind)


def attempt(scorer, samples: list[Sample]) -> list[dict] | None:
    """Scores of samples; None, with the memory freed, where the memory did not suffice."""
    try:
        return scorer.score(samples)
    except torch.OutOfMemoryError:
        pass  # left before collecting: the exception holds the frames that hold the tensors
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def tokens_that_fit(scorer, index: Index) -> int:
    """Tokens of a batch for `tokens_per_batch=auto`: on a GPU the largest power of two that fits, by trial.

    On a CPU, and where ranks run the model together, it is a fixed number. It is at most `batches.auto_limit`.
    """
    limit = plan.auto_limit(index)
    if scorer.collective or not torch.cuda.is_available():
        return min(limit, SHARED_TOKENS if scorer.collective else CPU_TOKENS)
    return largest(lambda size: attempt(scorer, index.samples(plan.probe_rows(index, size))) is not None, limit)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest budget up to `limit` that fits, by doubling from the smallest; the smallest where none fits."""
    size = plan.SMALLEST_AUTO
    while 2 * size <= limit and fits(2 * size):
        size *= 2
    return size
