"""The order of samples: a pure function of (seed, epoch, position), without state to save or to replay.

Position p of a run (p = samples consumed so far) belongs to epoch p // n. Within an epoch the samples are sorted by a
64-bit hash of (seed, epoch, sample), the SplitMix64 finaliser (Steele et al., 2014), so the order depends neither on
the number of processes nor on any library's random generator.
"""

from __future__ import annotations

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
        positions = np.arange(start, start + count)
        out = np.empty(count, dtype=np.int64)
        for epoch in np.unique(positions // self.samples):
            chosen = positions // self.samples == epoch
            out[chosen] = self.permutation(int(epoch))[positions[chosen] % self.samples]
        return out


def micro_batch(order: SampleOrder, start: int, micro_step: int, rank: int, world_size: int, size: int) -> np.ndarray:
    """Samples of one rank in one micro-step of the optimizer step whose first sample is at position `start`.

    The global batch has the same positions for every split into ranks and micro-steps.
    """
    return order.take(start + (micro_step * world_size + rank) * size, size)
