"""Parameters and buffers of a module:

groups for the optimizer, names left out of its state, buffers kept in float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ds_llm.compat.deepspeed import is_shared_expert, unpartitioned_shape
from ds_llm.compat.torch import set_buffer
from ds_llm.compat.transformers import Conv1D


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups of the trained parameters: those with fewer than two dimensions get no weight decay.

    Weights that only some ranks hold (`ds_llm.parallel.experts`) are groups of their own, marked as DeepSpeed asks.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    # the kept values of a pruned matrix are a vector
    dimensions = {id(p): len(getattr(p, "dense_shape", unpartitioned_shape(p))) for p in trained}
    matrices = [p for p in trained if dimensions[id(p)] >= 2]
    vectors = [p for p in trained if dimensions[id(p)] < 2]
    groups = []
    for weights, decay in ((matrices, weight_decay), (vectors, 0.0)):
        shared = [p for p in weights if not is_shared_expert(p)]
        groups.append({"params": shared, "weight_decay": decay})
        for name in sorted({p.group_name for p in weights if is_shared_expert(p)}):
            own = [p for p in weights if getattr(p, "group_name", None) == name]
            groups.append({"params": own, "weight_decay": decay, "name": name, "moe": True})
    return [g for g in groups if g["params"]]


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The trained matrices between embedding and output head: weights of linear layers, and of fused experts [E, M, N].

    Muon is made for these. Convolutions, routers that are no linear layers, and what a layer holds beside its matrices
    are not among them. Nor are pruned matrices, whose kept values are a vector. GPT-2's layers hold their weight
    transposed, so Muon's factor for tall matrices is that of the transpose there.
    """
    ends = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    ends += [m.get_output_embeddings() for m in module.modules() if hasattr(m, "get_output_embeddings")]
    left = {id(p) for end in ends if end is not None for p in end.parameters()}
    chosen = {}
    for owner in module.modules():
        for name, p in owner.named_parameters(recurse=False):
            dimensions = len(unpartitioned_shape(p))
            matrix = dimensions == 2 and name == "weight" and isinstance(owner, (nn.Linear, Conv1D))
            experts = dimensions == 3 and hasattr(owner, "num_experts")
            if p.requires_grad and (matrix or experts) and id(p) not in left:
                chosen[id(p)] = p
    return list(chosen.values())


def leave_out(module: nn.Module, names: Iterable[str]) -> None:
    """Keep parameters out of the module's state, and what bitsandbytes stores beside them (`weight.absmax`, ...).

    DeepSpeed leaves frozen ones out under their first name only, not under those they are tied to.
    """

    def drop(_, state: dict, prefix: str, __) -> None:
        for key in list(state):
            parts = key.removeprefix(prefix).split(".")
            if any(".".join(parts[: i + 1]) in names for i in range(len(parts))):
                del state[key]

    module.register_state_dict_post_hook(drop)


def exact_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the float32 buffers, before the module is cast.

    A cast to bf16 or fp16 would round the rotary frequencies.
    """
    return {n: b.detach().clone() for n, b in module.named_buffers() if b.dtype == torch.float32}


def restore_buffers(module: nn.Module, exact: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `exact_buffers` copied, on `device`."""
    for name, value in exact.items():
        owner, _, leaf = name.rpartition(".")
        set_buffer(module.get_submodule(owner), leaf, value.to(device))
