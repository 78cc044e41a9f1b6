"""Throughput of training: tokens per second, MFU, memory, remaining time."""

from __future__ import annotations

import time
from collections import deque

from ds_llm import hardware
from ds_llm.distributed import watchdog


class Meter:
    """Throughput of the training loop, averaged over the last `window` steps.

    `flops_per_token` is the cost of one token, forward and backward (`hardware.training_flops_per_token`); MFU is
    flops_per_token x tokens per second / (peak x world_size), after Chowdhery et al. 2022 (PaLM), left out where the
    peak of the device in `dtype` (fp32, bf16, fp16) is not known.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        flops_per_token: float = 0.0,
        world_size: int = 1,
        dtype: str = "fp32",
        window: int = 20,
    ):
        peak = hardware.peak_flops(hardware.device_name(), dtype)
        self._mfu_per_rate = flops_per_token / (peak * world_size) if peak and flops_per_token else None
        self._total = total_steps
        self._recent: deque[tuple[float, float]] = deque(maxlen=window)
        self._last = time.perf_counter()
        self._next = "a step"  # name of the next step in the report of a hang

    def start(self) -> None:
        """Start the clock. Call it before the first step, and again after an evaluation or a save."""
        self._last = time.perf_counter()
        watchdog.timed(self._next)

    def step(self, step: int, tokens: float) -> dict:
        """End the optimizer step number `step` that processed `tokens` tokens over all ranks.

        Returns `step_time` (s, this step), `tokens_per_s` (all ranks), `eta` (s), `memory_gb` (10^9 bytes, this rank)
        and, where the peak is known, `mfu` (share, 0 to 1).
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._next = f"step {step + 1}"
        watchdog.timed(self._next, finished=True)
        self._recent.append((seconds, float(tokens)))
        elapsed = max(sum(s for s, _ in self._recent), 1e-9)
        rate = sum(t for _, t in self._recent) / elapsed
        found = {
            "step_time": seconds,
            "tokens_per_s": rate,
            "eta": max(self._total - step, 0) * elapsed / len(self._recent),
            "memory_gb": hardware.memory_gb(),
        }
        if self._mfu_per_rate is not None:
            found["mfu"] = rate * self._mfu_per_rate
        return found
