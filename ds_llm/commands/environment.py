"""Environment variables that libraries read when they are imported; commands set them before those imports."""

from __future__ import annotations

import os


def equal_bits() -> None:
    """Make MKL give the same bits for any number of threads and any alignment of a tensor in memory.

    Otherwise both decide its instructions and so the last bits of its matrix products. MKL reads the variable once,
    when torch loads it. A value set by the user stays.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def deepspeed_on_cpu() -> None:
    """Make DeepSpeed, which peft imports, use the CPU; otherwise it warns where it finds no GPU.

    For commands without a DeepSpeed engine. A value set by the user stays.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def deepspeed_on_cpu_without_gpu() -> None:
    """`deepspeed_on_cpu` where torch, which this imports, finds no GPU."""
    import torch

    if not torch.cuda.is_available():
        deepspeed_on_cpu()
