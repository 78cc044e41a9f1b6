"""The exponential moving average of a rank's weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class MovingAverage:
    """average = d * average + (1 - d) * weights, with d = min(decay, (1 + t) / (10 + t)) at update t, from 0.

    weights: the fp32 tensors that the rank updates, in the same order at every call. `tensors` are their averages.
    """

    def __init__(self, weights: Iterable[torch.Tensor], decay: float):
        self.tensors = [p.detach().clone() for p in weights]
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, weights: Iterable[torch.Tensor]) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, weight in zip(self.tensors, weights, strict=True):
            average.lerp_(weight.detach().to(average.device), 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def swap(self, weights: Iterable[torch.Tensor]) -> None:
        """Exchange the averages and the weights, in place."""
        for average, weight in zip(self.tensors, weights, strict=True):
            held = weight.detach().clone()
            weight.data.copy_(average)
            average.copy_(held)

    def state(self) -> dict:
        return {"average": self.tensors, "updates": self.updates}

    def restore(self, saved: dict) -> None:
        """Load the dictionary that `state` returned."""
        self.updates = saved["updates"]
        for average, value in zip(self.tensors, saved["average"], strict=True):
            average.copy_(value)
