"""Triton where it is installed. Without it `jit` leaves a kernel as a plain function that is never called."""

from contextlib import AbstractContextManager, nullcontext

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # machines without a GPU need no Triton: every public function has a torch path
    triton = tl = None

    def jit(fn):
        return fn


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for n < 1)."""
    return 1 << max(0, n - 1).bit_length()


def launch_on(x: torch.Tensor) -> AbstractContextManager:
    """Makes x's GPU the current one: Triton launches there, wherever its arguments live."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# CPU tensors go to the kernels too, which then run in Triton's interpreter (TRITON_INTERPRET=1): set by the tests
interpret_on_cpu = False


def uses_triton(x: torch.Tensor) -> bool:
    """Whether an operator on x launches its kernel: no kernel computes in float64, and CPU tensors have none."""
    return triton is not None and (x.is_cuda or interpret_on_cpu) and x.dtype != torch.float64
