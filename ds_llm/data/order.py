"""The order of samples: a pure function of (seed, epoch, position), without state to save or to replay.

Position p of a run (p = samples consumed so far) belongs to epoch p // n. Within an epoch the samples are sorted by a
64-bit hash of (seed, epoch, sample), the SplitMix64 finaliser (Steele et al., 2014), so the order depends neither on
the number of processes nor on any library's random generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash64(values: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """SplitMix64 of `values` (any integers) keyed by seed and epoch; uint64, same shape."""
    with np.errstate(over="ignore"):
        key = _mix(np.uint64(seed) + _GOLDEN) + _mix(np.uint64(epoch) * _GOLDEN + np.uint64(1))
        return _mix(values.astype(np.uint64) * _GOLDEN + key)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SampleOrder:
    """Maps positions of a run to sample numbers 0..n-1; every epoch is a fresh permutation."""

    def __init__(self, samples: int, seed: int):
        if samples < 1:
            raise ValueError("an order needs at least one sample")
        self.samples, self.seed = samples, seed
        self._epoch, self._permutation = -1, None

    def permutation(self, epoch: int) -> np.ndarray:
        """Sample numbers of one epoch in order, int64 [n]."""
        if epoch != self._epoch:
            keys = hash64(np.arange(self.samples), self.seed, epoch)
            self._permutation, self._epoch = np.argsort(keys, kind="stable"), epoch
        return self._permutation

    def take(self, start: int, count: int) -> np.ndarray:
        """Sample numbers at positions start .. start+count-1, int64 [count]; may cross epochs."""
        return self.at(np.arange(start, start + count))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers at these positions, int64 of the same shape."""
        out = np.empty(positions.shape, dtype=np.int64)
        for epoch in np.unique(positions // self.samples):
            chosen = positions // self.samples == epoch
            out[chosen] = self.permutation(int(epoch))[positions[chosen] % self.samples]
        return out


class MixtureOrder:
    """Maps positions of a run to samples of several sources that are numbered one source after the other.

    Source k has `counts[k]` samples. An epoch draws round(weights[k] * counts[k]) of them and shuffles the draws of all
    sources. The draws of a source go through all its samples, over epochs too, before one comes again.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int):
        self.drawn = np.array([round(w * n) for w, n in zip(weights, counts, strict=True)], dtype=np.int64)  # an epoch
        self._firsts = np.concatenate([[0], np.cumsum(counts)])[:-1]
        self._ends = np.cumsum(self.drawn)
        self._mixed = SampleOrder(int(self._ends[-1]), seed)
        keys = hash64(np.arange(len(counts)), seed, 0)
        self._within = [SampleOrder(max(n, 1), int(key)) for n, key in zip(counts, keys, strict=True)]

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return self._mixed.samples

    def take(self, start: int, count: int) -> np.ndarray:
        """Sample numbers at positions start .. start+count-1, int64 [count]; may cross epochs."""
        positions = np.arange(start, start + count)
        slots = self._mixed.at(positions)
        sources = np.searchsorted(self._ends, slots, "right")
        draws = slots - (self._ends - self.drawn)[sources] + positions // self.samples * self.drawn[sources]
        out = np.empty(count, dtype=np.int64)
        for source in np.unique(sources):
            chosen = sources == source
            out[chosen] = self._firsts[source] + self._within[source].at(draws[chosen])
        return out


Order = SampleOrder | MixtureOrder


def micro_batch(order: Order, start: int, micro_step: int, rank: int, world_size: int, size: int) -> np.ndarray:
    """Samples of one rank in one micro-step of the optimizer step whose first sample is at position `start`.

    The global batch has the same positions for every split into ranks and micro-steps.
    """
    return order.take(start + (micro_step * world_size + rank) * size, size)
