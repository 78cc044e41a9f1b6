"""The learning rate: a pure function of the step, without state to save or to replay."""

from __future__ import annotations

import math

from ds_llm.config.sections import OptimConfig


def warmup_steps(optim: OptimConfig, total: int) -> int:
    """Steps of linear warm-up in a run of `total` steps."""
    return optim.warmup_steps if optim.warmup_steps is not None else math.ceil(optim.warmup_ratio * total)


def learning_rate(optim: OptimConfig, step: int, total: int) -> float:
    """Learning rate of optimizer step `step` (0 .. total-1).

    Warm-up rises linearly and reaches the peak at its last step. Afterwards, with x in [0, 1] the share of the decay
    that is done and r = min_lr_ratio: cosine r + (1-r)(1+cos(pi x))/2; linear 1 - (1-r)x; polynomial
    r + (1-r)(1-x)^power; constant 1; wsd 1, then linear over the last decay_ratio of all steps (Hu et al., 2024,
    MiniCPM, "warmup-stable-decay").
    """
    warmup = warmup_steps(optim, total)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    low, span = optim.min_lr_ratio, max(total - warmup - 1, 1)
    x = min((step - warmup) / span, 1.0)
    if optim.schedule == "cosine":
        factor = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * x))
    elif optim.schedule == "linear":
        factor = 1 - (1 - low) * x
    elif optim.schedule == "polynomial":
        factor = low + (1 - low) * (1 - x) ** optim.power
    elif optim.schedule == "constant":
        factor = 1.0
    else:
        decay = max(round(optim.decay_ratio * total), 1)
        factor = 1 - (1 - low) * min(max((step - (total - 1 - decay)) / decay, 0.0), 1.0)
    return optim.lr * factor
