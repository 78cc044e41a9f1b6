"""The prunable weights of a causal language model, and its blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ds_llm.compat.transformers import Conv1D, apply_gate
from ds_llm.errors import UserError
from ds_llm.models.boost import QwenBoostForCausalLM
from ds_llm.models.moe import Experts, swiglu

INCLUDE = ("head", "embeddings")  # dense unless asked
ROUTERS = ("gate", "router", "shared_expert_gate")  # linear layers of these names choose experts and stay dense
BOOSTED = (
    "a boosted model is not pruned as one: take its models out (launch/convert.py extract), prune each, and join them "
    "again (launch/convert.py boost)"
)
OUT, IN = "down_proj", ("gate_up_proj", "up_proj")  # the 3-D parameters of experts


@dataclass(frozen=True)
class Target:
    """A prunable weight.

    name: of the parameter in `model.named_parameters()`. weight: [rows, columns], or [experts, rows, columns] for a
    stack of experts; columns are the inputs. kind: linear, experts or embedding.
    """

    name: str
    module: nn.Module
    parameter: str
    kind: str

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, self.parameter).data


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's blocks in order, each with its name: the list with as many modules as the model has layers.

    Raises `UserError` for a model without such a list, and for a boosted model, which has several.
    """
    if isinstance(model, QwenBoostForCausalLM):
        raise UserError(BOOSTED)
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return [(f"{name}.{i}", block) for i, block in enumerate(module)]
    raise UserError(f"{type(model).__name__}: has no list of {depth} blocks, so it cannot be pruned block by block")


def block_targets(prefix: str, block: nn.Module) -> list[Target]:
    """The prunable weights of one block, in order: linear layers but routers, and experts.

    Raises `UserError` for weights that are stored transposed ([inputs, outputs]) or packed, whose rows differ.
    """
    found = []
    for path, module in block.named_modules():
        name = f"{prefix}.{path}" if path else prefix
        if isinstance(module, Conv1D):
            raise UserError(f"{name}: a Conv1D stores its weight transposed; models with such layers cannot be pruned")
        if isinstance(module, nn.Linear):
            if not module.weight.is_floating_point() or hasattr(module.weight, "quant_state"):
                raise UserError(f"{name}: its weight is quantised; prune the model before it is quantised")
            if path.rpartition(".")[2] not in ROUTERS:
                found.append(Target(f"{name}.weight", module, "weight", "linear"))
        elif is_experts(module):
            if getattr(module, "is_transposed", False):
                raise UserError(
                    f"{name}: these experts are stored transposed; models with such layers cannot be pruned"
                )
            found += [Target(f"{name}.{p}", module, p, "experts") for p in (expert_input(module), OUT)]
    return found


def prunable(model: nn.Module, include: Iterable[str] = ()) -> list[Target]:
    """All prunable weights of a model, each once; with `include` the output head and the embeddings too.

    Tied weights are one target, of the kind of the head.
    """
    targets = [target for name, block in find_blocks(model) for target in block_targets(name, block)]
    seen, unique = set(), []
    for target in targets + ends(model, include):
        if id(getattr(target.module, target.parameter)) not in seen:
            seen.add(id(getattr(target.module, target.parameter)))
            unique.append(target)
    return unique


def ends(model: nn.Module, include: Iterable[str]) -> list[Target]:
    """The output head and the embeddings as targets, if `include` names them. Tied weights are one target, the head."""
    include, found = set(include), []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if "head" in include:
        if head is None:
            raise UserError(f"{type(model).__name__}: has no output head to prune")
        found.append(Target(names[id(head.weight)], head, "weight", "linear"))
    if "embeddings" in include and not (found and head.weight is embedding.weight):
        found.append(Target(names[id(embedding.weight)], embedding, "weight", "embedding"))
    return found


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a stack of experts: it has 3-D weights, and its forward takes the routing."""
    if not (isinstance(module, Experts) or apply_gate(module)):
        return False
    stacks = {name for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
    return OUT in stacks and bool(stacks.intersection(IN))


def expert_input(module: nn.Module) -> str:
    """Name of the first weight of the experts, which multiplies their inputs."""
    return next(name for name in IN if getattr(module, name, None) is not None)


def expert_rows(module: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Hidden states [T, H] and chosen experts [T, K] from the arguments of a call of experts, in either order.

    Ours take (hidden, weights, experts), those of transformers (hidden, experts, weights).
    """
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    hidden = next(x for x in tensors if x.is_floating_point())
    index = next(x for x in tensors if not x.is_floating_point() and x.dtype != torch.bool)
    return hidden.reshape(-1, hidden.shape[-1]), index.reshape(-1, index.shape[-1])


def expert_hidden(module: nn.Module, rows: Tensor, expert: int) -> Tensor:
    """The hidden activations [T, I] of expert `expert` for input rows [T, H]: the input of its `down_proj`."""
    name = expert_input(module)
    bias = getattr(module, f"{name}_bias", None) if getattr(module, "has_bias", False) else None
    out = nn.functional.linear(rows, getattr(module, name)[expert], None if bias is None else bias[expert])
    if isinstance(module, Experts):
        return swiglu(*out.chunk(2, dim=-1))
    return apply_gate(module)(out) if module.has_gate else module.act_fn(out)
