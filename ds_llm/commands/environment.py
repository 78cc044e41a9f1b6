"""Environment variables that libraries read while they are imported: a command sets them before it imports those."""

from __future__ import annotations

import os


def equal_bits() -> None:
    """Have MKL give the same bits for any number of threads and any alignment of a tensor in memory.

    Both otherwise choose its instructions, and so the last bits of its matrix products. MKL reads the variable once,
    when it is loaded with torch. A value that the user has set stays.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def deepspeed_on_cpu() -> None:
    """Have DeepSpeed, which peft imports, take the CPU: it otherwise warns where it finds no GPU.

    For commands that run no DeepSpeed engine. A value that the user has set stays.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def deepspeed_on_cpu_without_gpu() -> None:
    """`deepspeed_on_cpu` where torch, which this imports, finds no GPU."""
    import torch

    if not torch.cuda.is_available():
        deepspeed_on_cpu()
