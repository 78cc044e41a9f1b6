"""Puts the project's RoPE, routing and expert kernels into transformers models."""

from __future__ import annotations

import types
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch.nn.functional as F
from torch import Tensor, nn

from ds_llm.compat.hf_model import takes_cache
from ds_llm.compat.transformers import ATTENTION, ROUTERS, experts_kernel, without_renaming
from ds_llm.kernels.moe_routing import route
from ds_llm.kernels.rope import apply_rope
from ds_llm.models.expert_modules import is_fused, run_experts

# what a model has unless its user asked for another implementation
DEFAULT_EXPERTS = (None, "eager", "grouped_mm")


@dataclass
class Acceleration:
    """What `accelerate` did: numbers of modules that now use a kernel, and why others do not."""

    rope: int = 0
    routers: int = 0
    experts: int = 0
    note: str | None = None

    def __str__(self) -> str:
        parts = [f"{count} {name}" for name, count in vars(self).items() if name != "note" and count]
        done = f"kernels in use: {', '.join(parts)}" if parts else "no module was changed"
        return f"{done} ({self.note})" if self.note else done


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' `apply_rotary_pos_emb` for q [B, Hq, S, D] and k [B, Hk, S, D]; cos and sin [B, S, D]."""
    q, k = apply_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def _route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Forward of a softmax router: logits [T, E], weights [T, K], experts [T, K]."""
    logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    weights, experts, _ = route(logits, self.top_k, normalize=getattr(self, "norm_topk_prob", True))
    return logits, weights.to(logits.dtype), experts.long()


def _route_float32_weights(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mixtral keeps the weights in float32 and always normalises them."""
    logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    weights, experts, _ = route(logits, self.top_k)
    return logits, weights, experts.long()


@cache
def _with_forward(original: type, forward) -> type:
    # a subclass of the same name: hooks, `isinstance` and lists of class names keep working, other models of the
    # process keep the original, and the module's state dict does not change
    return type(original.__name__, (original,), {"forward": forward, "__doc__": original.__doc__, "ds_llm": True})


@cache
def _with_rope(original: type) -> type | None:
    """The attention class whose forward calls `_rotate`; None where its forward does not call the usual function."""
    forward = without_renaming(original.forward)
    if "apply_rotary_pos_emb" not in getattr(forward, "__code__", _rotate.__code__).co_names:
        return None
    replaced = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, "apply_rotary_pos_emb": _rotate},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    replaced.__kwdefaults__ = forward.__kwdefaults__
    replaced.__annotations__ = forward.__annotations__
    replaced.__doc__ = forward.__doc__
    return _with_forward(original, takes_cache(replaced) if "cache" in forward.__code__.co_varnames else replaced)


def _accelerated(module: nn.Module) -> tuple[str, type | None] | None:
    """The kind of module and the class that it is to have (None: left as it is), or None for any other module."""
    original = type(module)
    package, _, file = original.__module__.rpartition(".modeling_")
    if not package.startswith("transformers.models."):
        return None
    if original.__name__ == ATTENTION.get(file):
        return "rope", _with_rope(original)
    if original.__name__ == ROUTERS.get(file):
        return "routers", _with_forward(original, _route_float32_weights if file == "mixtral" else _route)
    if is_fused(module):
        supported = experts_kernel(module.config) in DEFAULT_EXPERTS
        return "experts", _with_forward(original, run_experts) if supported else None
    return None


def accelerate(model: nn.Module) -> Acceleration:
    """Makes the attention, routers and experts of a transformers model use the project's kernels, in place.

    Attention of Llama, Qwen2, Qwen3, Qwen3-MoE, Mixtral and OLMoE, routers of the last three, and fused experts of any
    family (`ds_llm.models.expert_modules`), also inside a wrapper such as a PEFT model. Outputs and gradients are those
    of the unchanged model up to rounding: rotations and weighted sums of expert outputs are computed in float32 where
    transformers computes in the model's dtype, and equal router logits choose the expert of lower index. Parameters,
    their names and saved files do not change. Experts for which another implementation was asked
    (`experts_implementation`) keep it.

    Returns what was done; a model without such modules is left as it is, and the report says why.
    """
    decoder = import_module("ds_llm.models.decoder")
    done, kept, already = Counter(), Counter(), 0
    for module in model.modules():
        if isinstance(module, decoder.DecoderAttention) or getattr(type(module), "ds_llm", False):
            already += 1
            continue
        match = _accelerated(module)
        if match is None:
            continue
        kind, replacement = match
        if replacement is None:
            kept[kind] += 1
        else:
            module.__class__ = replacement
            done[kind] += 1
    note = None
    if kept["experts"]:
        note = f"{kept['experts']} experts keep the implementation that was asked for"
    if kept["rope"]:
        note = f"{kept['rope']} attention layers of this version of transformers rotate in a way that is not known"
    if not done and not note:
        if already:
            note = f"{type(model).__name__} uses the kernels already"
        else:
            note = f"{type(model).__name__} has no attention or router of {', '.join(ATTENTION)}, and no fused experts"
    return Acceleration(done["rope"], done["routers"], done["experts"], note)
