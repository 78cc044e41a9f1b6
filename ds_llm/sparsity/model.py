"""Compact training of whole models: replaces pruned weights by values and masks, and reports the memory it saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from ds_llm.errors import UserError
from ds_llm.kernels.sparse_update import PackedMask, compact
from ds_llm.sparsity.linear import SparseLinear, make_sparse


class SparseTensor(NamedTuple):
    """A pruned weight: its `name` in the dense model, the module that holds it, and its name in that module."""

    name: str
    module: nn.Module
    leaf: str

    @property
    def values(self) -> nn.Parameter:
        return getattr(self.module, f"{self.leaf}_values")

    @property
    def mask(self) -> PackedMask:
        return getattr(self.module, f"{self.leaf}_mask")


def sparsify(model: nn.Module, masks: Mapping[str, PackedMask]) -> nn.Module:
    """Hold the masked weights of a model as values and masks, in place; returns the model.

    masks: by name of the parameter, as from `ds_llm.sparsity.masks.load_masks`. Raises `UserError` for a mask of
    another model, for a weight that is not 0 where its mask is 0, and for embeddings tied to the output head, which
    must stay dense.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    for name, mask in masks.items():
        if name not in parameters:
            raise UserError(f"masks: the model has no weight {name}: they belong to another model")
        weight = parameters.pop(name)
        if weight.shape != mask.shape:
            raise UserError(f"masks: {name} is {list(weight.shape)} in the model and {list(mask.shape)} in the mask")
        if len(names[id(weight)]) > 1:
            raise UserError(
                f"masks: {' and '.join(names[id(weight)])} are one weight; tied embeddings must stay dense in training"
            )
        check_zeros(name, weight, mask)
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if type(module) is nn.Linear:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, SparseLinear.from_linear(module, mask))
        else:
            make_sparse(module, leaf, mask)
        del weight
    model.kept_weights = {tensor.name: tensor.mask.nnz for tensor in sparse_tensors(model)}
    return model


def check_zeros(name: str, weight: Tensor, mask: PackedMask) -> None:
    """Raise `UserError` unless `weight` is 0 wherever its mask is 0."""
    lost = int(weight.count_nonzero()) - int(compact(weight.detach(), mask).count_nonzero())
    if lost:
        raise UserError(f"masks: {lost:,} weights of {name} that the mask drops are not 0; prune the model with it")


def sparse_tensors(model: nn.Module) -> Iterator[SparseTensor]:
    """The weights held as values and masks, in the order of the model's modules."""
    for path, module in model.named_modules():
        for leaf in getattr(type(module), "sparse_leaves", ()):
            yield SparseTensor(f"{path}.{leaf}" if path else leaf, module, leaf)


def is_sparse(model: nn.Module) -> bool:
    """Whether `sparsify` has prepared the model."""
    return hasattr(model, "kept_weights")


def freeze_dense(model: nn.Module) -> None:
    """Freeze all weights but the kept values of pruned ones."""
    values = {id(tensor.values) for tensor in sparse_tensors(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in values)


def add_lora(model: nn.Module, targets: list[str], rank: int, scale: float, init: str) -> int:
    """Train masked adapters of the pruned linear layers and nothing else; returns their number.

    targets: ["all-linear"] for all pruned linear layers, or ends of their names. Raises `UserError` for a target that
    matches no pruned linear layer.
    """
    model.requires_grad_(False)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    chosen = set(layers) if list(targets) == ["all-linear"] else set()
    for target in targets if not chosen else ():
        found = {name for name in layers if name == target or name.endswith(f".{target}")}
        if not found:
            raise UserError(f"lora.targets: '{target}' is no pruned linear layer; masked adapters are for those only")
        chosen |= found
    for name, layer in layers.items():
        if name in chosen:
            layer.add_lora(rank, scale, init)
    return len(chosen)


def summary(model: nn.Module, dtype: str) -> dict[str, float]:
    """Size of compact training: weights `kept` of the `prunable` ones in `layers` tensors, their share `density`, and
    bytes of the state, `state_bytes`, against those of dense training, `dense_state_bytes`.

    The state is a weight, its gradient, Adam's two moments and, in 16 bits, the fp32 master copy: 16 bytes per trained
    weight (summed over all ranks); 4 per frozen one, 2 with the `dtype` bf16 or fp16; and the masks. Dense training
    trains every weight.
    """
    frozen = 4 if dtype == "fp32" else 2
    tensors = list(sparse_tensors(model))
    kept, whole = sum(t.mask.nnz for t in tensors), sum(t.mask.shape.numel() for t in tensors)
    masks = sum(b.numel() * b.element_size() for t in tensors for b in t.mask.buffers(recurse=False))
    state, dense = masks, 0
    for parameter in model.parameters():
        state += parameter.numel() * (16 if parameter.requires_grad else frozen)
        dense += getattr(parameter, "dense_shape", parameter.shape).numel() * 16
    dense -= sum(16 * p.numel() for n, p in model.named_parameters() if n.endswith((".lora_A", ".lora_B")))
    return {
        "layers": len(tensors),
        "kept": kept,
        "prunable": whole,
        "density": kept / whole,
        "state_bytes": state,
        "dense_state_bytes": dense,
    }
