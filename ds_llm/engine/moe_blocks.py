"""Blocks of experts under ZeRO-3."""

from __future__ import annotations

import torch
from torch import nn

from ds_llm.compat.deepspeed import set_z3_leaf_modules
from ds_llm.compat.transformers import MOE_BLOCKS


def keep_experts_whole(module: nn.Module) -> None:
    """Have ZeRO-3 gather each block of `MOE_BLOCKS` as one.

    Otherwise ranks whose tokens skip an expert wait without end for ranks whose tokens use it. ZeRO-3 reduces the
    gradients of such a block when the gradient of the block's input arrives. A frozen model below gives an input
    without a gradient, so this requires one of every input.
    """
    blocks = [m for m in module.modules() if type(m).__name__ in MOE_BLOCKS]
    for block in blocks:
        if any(p.requires_grad for p in block.parameters()):
            block.register_forward_pre_hook(_require_gradient)
    if blocks:
        set_z3_leaf_modules(module, list({type(m) for m in blocks}), raise_if_not_found=False)


def _require_gradient(_, args: tuple) -> tuple:
    hidden, *rest = args
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    return hidden, *rest
