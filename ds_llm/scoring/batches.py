"""Plans batches of rows, and deals them to ranks.

The batches are a function of the rows and the token budget: rows by falling cost, cut where the longest row of a batch
times their number would exceed the budget. So a batch holds the same rows on any number of ranks and after any
interruption, and its scores are the same.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from ds_llm.scoring.index import SORT_ROWS, Index

SMALLEST_AUTO, LARGEST_AUTO = 1024, 1 << 17  # tokens of a batch between which auto searches
FEWEST_BATCHES = 64  # that auto leaves, so that ranks can share them evenly
QUADRATIC_TOKENS = 8192  # length at which attention about doubles the cost of a token in usual models


@dataclass
class Plan:
    """Batches of rows.

    bounds: int64 [batches + 1]; batch b holds the rows `index.order[bounds[b]:bounds[b + 1]]`. tokens: int64 [batches],
    of each batch without padding. padded: int64 [batches], with every row padded to the longest.
    """

    bounds: np.ndarray
    tokens: np.ndarray
    padded: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def padding(self) -> float:
        """Share of padding where rows are padded to the longest of their batch."""
        return 1 - self.tokens.sum() / max(1, self.padded.sum())

    def rows(self, index: Index, batch: int) -> np.ndarray:
        """Numbers of the rows of a batch, int64."""
        return np.asarray(index.order[self.bounds[batch] : self.bounds[batch + 1]], np.int64)


def make(index: Index, tokens_per_batch: int) -> Plan:
    """Cut the sorted rows into batches; a row longer than the budget is a batch of its own."""
    order, cost = index.order, index.rows["cost"]
    bounds, longest = [0], []
    while bounds[-1] < len(order):
        longest.append(int(cost[order[bounds[-1]]]))
        bounds.append(min(len(order), bounds[-1] + max(1, tokens_per_batch // longest[-1])))
    edges = np.array(bounds, np.int64)
    tokens = np.zeros(len(edges) - 1, np.int64)
    for start in range(0, len(order), SORT_ROWS):
        piece = order[start : start + SORT_ROWS]
        owner = np.searchsorted(edges, np.arange(start, start + len(piece)), "right") - 1
        tokens += np.bincount(owner, cost[piece], len(tokens)).astype(np.int64)
    return Plan(edges, tokens, np.array(longest, np.int64) * np.diff(edges))


def assign(plan: Plan, batches: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Deal batches to ranks, the most expensive first, each to the rank with the least cost so far.

    Returns int64 batch numbers per rank, by falling cost.
    """
    mean = plan.padded[batches] / np.maximum(1, np.diff(plan.bounds)[batches])
    costs = plan.padded[batches] * (1 + mean / QUADRATIC_TOKENS)
    load = [(0.0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for position in np.argsort(-costs, kind="stable"):
        total, rank = load[0]
        heapq.heapreplace(load, (total + float(costs[position]), rank))
        shares[rank].append(int(batches[position]))
    return [np.array(share, np.int64) for share in shares]


def auto_limit(index: Index) -> int:
    """The largest budget for `auto`: the largest power of two that leaves `FEWEST_BATCHES` batches."""
    total = int(index.rows["cost"].sum(dtype=np.int64))
    limit = SMALLEST_AUTO
    while limit < LARGEST_AUTO and 2 * limit * FEWEST_BATCHES <= total:
        limit *= 2
    return limit


def probe_rows(index: Index, tokens: int) -> np.ndarray:
    """The longest rows that fill a budget, repeated where there are too few; at least one row."""
    longest = int(index.rows["cost"][index.order[0]])
    count = max(1, tokens // longest)
    return np.resize(np.asarray(index.order[:count], np.int64), count)
