"""Blocks under ZeRO-3 whose layers do not run equally often on every rank."""

from __future__ import annotations

import torch
from torch import nn

from ds_llm.compat.deepspeed import set_z3_leaf_modules
from ds_llm.compat.transformers import MOE_BLOCKS


def keep_blocks_whole(module: nn.Module) -> None:
    """Have ZeRO-3 gather as one each block of `MOE_BLOCKS`, and each that runs on documents one after the other.

    Otherwise ranks whose tokens skip an expert, or that have fewer documents, wait without end for the others. ZeRO-3
    reduces the gradients of such a block when the gradient of its first positional input arrives. So this makes the
    input positional that was given by name, and requires a gradient of it where a frozen model below gives one without.
    """
    blocks = [m for m in module.modules() if type(m).__name__ in MOE_BLOCKS or hasattr(type(m), "each_document_apart")]
    for block in blocks:
        block.register_forward_pre_hook(_give_input_first, with_kwargs=True)
    if blocks:
        set_z3_leaf_modules(module, list({type(m) for m in blocks}), raise_if_not_found=False)


def _give_input_first(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if not args:
        name, *_ = kwargs
        args, kwargs = (kwargs[name],), {n: value for n, value in kwargs.items() if n != name}
    hidden, *rest = args
    trained = any(p.requires_grad for p in block.parameters())
    if trained and torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    return (hidden, *rest), kwargs
