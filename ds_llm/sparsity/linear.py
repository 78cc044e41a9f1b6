"""Layers that train only the kept weights of a pruned model, each held as a vector of values and a bit mask.

The parameter `weight_values` [nnz] and the mask `weight_mask` replace a pruned `weight` [..., C]. The forward pass
expands them to the dense weight for the matrix product; the backward pass compacts the dense gradient. Values,
gradients and optimizer states have the size of the kept weights, and a pruned weight stays 0. `dense_shape` of the
values is the shape of the dense weight.
"""

from __future__ import annotations

import threading
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ds_llm.compat.torch import remove_parameter
from ds_llm.kernels.sparse_update import PackedMask, compact, expand, expand_into


class SparseLinear(nn.Module):
    """A linear layer y = x W^T + b that holds and trains only the kept weights of W.

    values [nnz] in row-major order of mask.shape = (out_features, in_features); bias [out_features] or None. The dense
    weight exists only during a product: the forward pass does not keep it for the backward pass.
    """

    sparse_leaves = ("weight",)

    def __init__(self, values: Tensor, mask: PackedMask, bias: nn.Parameter | None = None):
        super().__init__()
        self.out_features, self.in_features = mask.shape
        self.weight_values = values_parameter(values, mask)
        self.weight_mask = mask
        self.bias = bias
        self.lora_A = self.lora_B = None
        self.lora_scale = 0.0

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: PackedMask) -> SparseLinear:
        """The layer equal to `linear`, whose weight must be 0 wherever the mask is 0."""
        return cls(compact(linear.weight.detach(), mask), mask, linear.bias)

    def add_lora(self, rank: int, scale: float, init: str) -> None:
        """Freeze the values and train W + scale * mask * (B A) instead: A [rank, in_features], B [out_features, rank].

        B begins at 0. init: "default" draws A as peft does (Kaiming uniform), "gaussian" from N(0, 1 / rank^2). Because
        the mask applies in training already, merging changes neither the outputs nor the density.
        """
        values = self.weight_values.requires_grad_(False)
        self.lora_A = nn.Parameter(values.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(values.new_zeros(self.out_features, rank))
        self.lora_scale = scale
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def effective_values(self) -> Tensor:
        """The kept weights [nnz] in use: with an adapter, the merged ones."""
        if self.lora_A is None:
            return self.weight_values
        return merged(self.weight_values, self.weight_mask, self.lora_A, self.lora_B, self.lora_scale)

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_features, in_features], expanded at every access; differentiable in the values."""
        return expand(self.effective_values(), self.weight_mask)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        values, bias = self.effective_values(), self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, values, bias = (None if t is None else t.to(dtype) for t in (x, values, bias))
        return _Product.apply(x, values, bias, self.weight_mask)

    def extra_repr(self) -> str:
        lora = "" if self.lora_A is None else f", lora_rank={self.lora_A.shape[0]}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{lora}"


class _Product(torch.autograd.Function):
    """x W^T + b, expanding W from its values in the forward pass and again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, bias: Tensor | None, mask: PackedMask) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.mask = mask
        return F.linear(x, _weight(values, mask), bias)

    @staticmethod
    @once_differentiable  # a graph of this pass would keep the shared memory, which the next product overwrites
    def backward(ctx, grad: Tensor):
        x, values = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            dense = _scratch(ctx.mask.shape, grad)
            dense = torch.mm(rows.t(), x.reshape(-1, x.shape[-1]), **({} if dense is None else {"out": dense}))
            grad_values = compact(dense, ctx.mask)
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _weight(values, ctx.mask)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_values, grad_bias, None


def _weight(values: Tensor, mask: PackedMask) -> Tensor:
    dense = _scratch(mask.shape, values)
    return expand(values, mask) if dense is None else expand_into(dense, values, mask)


_memory = threading.local()


def _scratch(shape: torch.Size, like: Tensor) -> Tensor | None:
    """A buffer on the CPU for one dense weight, the same at every call in a thread; None on other devices.

    A new allocation costs a third of a layer's time, because its pages are new. Returned tensors and those saved for
    the backward pass must not be views of the buffer.
    """
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    held = vars(_memory).get(like.dtype)
    if held is None or held.numel() < shape.numel():
        held = vars(_memory)[like.dtype] = torch.empty(shape.numel(), dtype=like.dtype)
    return held[: shape.numel()].view(shape)


def merged(values: Tensor, mask: PackedMask, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """values + scale * mask * (b a) at the kept positions: [nnz], of a [rank, C] and b [R, rank]."""
    return values + scale * compact(b @ a, mask)


def values_parameter(values: Tensor, mask: PackedMask) -> nn.Parameter:
    """The trainable values of a mask. Optimizers treat them as a matrix of `dense_shape`, with weight decay."""
    parameter = nn.Parameter(values)
    parameter.dense_shape = mask.shape
    return parameter


def make_sparse(module: nn.Module, leaf: str, mask: PackedMask) -> None:
    """Replace the parameter `leaf` of any module by values and a mask, in place; its code still reads a dense `leaf`.

    For modules other than linear layers: stacks of experts, heads, embeddings. For a stack (three dimensions) the
    backward pass runs the module's forward pass again, so that the dense weights are not kept.
    """
    weight = getattr(module, leaf)
    stack = weight.dim() > 2
    setattr(module, f"{leaf}_values", values_parameter(compact(weight.detach(), mask), mask))
    setattr(module, f"{leaf}_mask", mask)
    remove_parameter(module, leaf)
    module.__class__ = _sparse_class(type(module), leaf, stack)


@cache
def _sparse_class(original: type, leaf: str, stack: bool) -> type:
    # a subclass of the same name: hooks, `isinstance` and lists of class names keep working
    def dense(self) -> Tensor:
        return expand(getattr(self, f"{leaf}_values"), getattr(self, f"{leaf}_mask"))

    members = {
        leaf: property(dense),
        "sparse_leaves": (*getattr(original, "sparse_leaves", ()), leaf),
        "__doc__": original.__doc__,
    }
    if stack and not getattr(original, "recomputed", False):

        def forward(self, *args, **kwargs):
            if not torch.is_grad_enabled():
                return original.forward(self, *args, **kwargs)
            return checkpoint(original.forward, self, *args, use_reentrant=False, **kwargs)

        members |= {"forward": forward, "recomputed": True}
    return type(original.__name__, (original,), members)
