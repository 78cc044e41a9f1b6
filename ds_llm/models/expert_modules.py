"""Recognises modules of transformers that hold all experts of a layer in 3-D parameters, by what they hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_llm.compat.transformers import apply_gate, has_usual_gate
from ds_llm.kernels.moe_routing import permute, unpermute
from ds_llm.models.moe import Experts, grouped_linear


def is_fused(module: nn.Module) -> bool:
    """Whether `run_experts` computes what the module's forward does.

    Such a module follows transformers' common interface of experts: `num_experts`, 3-D parameters `gate_up_proj` (or
    `up_proj` without a gate) and `down_proj`, each with or without a bias, and flags that say how they lie.
    """
    first = "gate_up_proj" if getattr(module, "has_gate", False) else "up_proj"
    weights = [getattr(module, name, None) for name in (first, "down_proj")]
    return (
        apply_gate(module) is not None
        and isinstance(getattr(module, "num_experts", None), int)
        and all(torch.is_tensor(weight) and weight.ndim == 3 for weight in weights)
        and not getattr(module, "has_post_expert_norm", False)
    )


def is_shareable(module: nn.Module) -> bool:
    """Whether `ds_llm.parallel.experts` can divide the module's experts among ranks.

    They have a gate that is activated and multiplied, `gate_up_proj` [E, 2 I, H] with the gate's rows first,
    `down_proj` [E, H, I], and no bias.
    """
    if isinstance(module, Experts):
        return True
    plain = not getattr(module, "has_bias", False) and not getattr(module, "is_transposed", False)
    concatenated = getattr(module, "is_concatenated", True)
    return is_fused(module) and module.has_gate and plain and concatenated and has_usual_gate(module)


def run_experts(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward of fused experts by grouped products: hidden [T, H], index and weights [T, K] -> [T, H]."""
    rows, offsets, inverse = permute(hidden_states, top_k_index, self.num_experts)
    if self.has_gate:
        rows = apply_gate(self)(_project(self, "gate_up_proj", rows, offsets))
    else:
        rows = self.act_fn(_project(self, "up_proj", rows, offsets))
    out = unpermute(_project(self, "down_proj", rows, offsets), inverse, top_k_weights)
    return out.to(hidden_states.dtype)


def _project(experts: nn.Module, name: str, rows: Tensor, offsets: Tensor) -> Tensor:
    """Rows [R, in] sorted by expert times each expert's matrix, plus its bias: [R, out]."""
    weight = getattr(experts, name)
    out = grouped_linear(rows, weight.transpose(1, 2) if experts.is_transposed else weight, offsets)
    if not experts.has_bias:
        return out
    # rows behind the last offset belong to no expert, and nobody reads them
    numbers = torch.arange(len(rows), device=rows.device, dtype=offsets.dtype)
    owners = torch.searchsorted(offsets, numbers, right=True).clamp_(max=experts.num_experts - 1)
    return out + getattr(experts, f"{name}_bias")[owners]
