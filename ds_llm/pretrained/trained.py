"""Which weights of a model were trained."""

from __future__ import annotations

import torch
from torch import nn

from ds_llm.errors import UserError


def trained_names(model: nn.Module, weights: dict[str, torch.Tensor], what: str) -> list[str]:
    """Names of the trained weights. Raises `UserError` about `what` unless all of them are in `weights`, whole."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    bad = [name for name in names if name not in weights or not weights[name].numel()]
    if bad or not names:
        raise UserError(f"{what} was not gathered whole, first {bad[0] if bad else 'all of it'}")
    return names
