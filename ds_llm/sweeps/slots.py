"""Slots of a sweep: the devices of each trial that runs at the same time."""

from __future__ import annotations

import os
import re

from ds_llm.errors import ConfigError


def slots(gpus: str | None, parallel: int | None) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each slot; None leaves it as it is.

    gpus: `0,1` for a trial on each GPU, `0+1,2+3` for trials on two GPUs. The numbers refer to the devices that this
    process sees: where CUDA_VISIBLE_DEVICES is set, 0 is the first of its devices.
    """
    if gpus is None:
        if parallel is not None and parallel < 1:
            raise ConfigError(f"--parallel: {parallel} must be at least 1")
        return [None] * (parallel or 1)
    import torch

    if not re.fullmatch(r"\d+([,+]\d+)*", gpus):
        raise ConfigError(f"--gpus: '{gpus}' is not a list such as 0,1 or 0+1,2+3")
    numbers = [int(number) for number in re.split(r"[,+]", gpus)]
    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError("--gpus: there is no GPU here; --parallel N runs N trials at a time")
    if max(numbers) >= count:
        raise ConfigError(f"--gpus: there is no GPU {max(numbers)}; they are 0 to {count - 1}")
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"--gpus: '{gpus}' names a GPU twice")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(i) for i in range(count)]
    return [",".join(names[int(number)] for number in group.split("+")) for group in gpus.split(",")]
