"""Triton 3.6 to 3.9: its compiler, called without a GPU.

`NAMES`: each such name, the module it lies in and what it is for. `triton.jit` and `triton.language` are public.
"""

from __future__ import annotations

from ds_llm.compat.names import lookup

NAMES = {
    "knobs": ("triton", "settings: whether kernels are interpreted, where `cuobjdump` lies"),
    "GPUTarget": ("triton.backends.compiler", "the card to compile for"),
    "ASTSource": ("triton.compiler", "a kernel with types of its arguments, as the compiler takes it"),
}

__getattr__ = lookup("triton", NAMES)
