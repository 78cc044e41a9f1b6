"""Weights that are read where they are needed.

A `Deferred` tensor has a shape and a dtype but no values. It remembers how they come about: from bytes of a weight
file, by the operations that transformers applies when it loads a model, such as the stacking of experts. `read` gives a
part of the values and touches little more of the file than that part. So a rank of ZeRO-3 never holds a whole model.
`settle` puts all values in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ds_llm.compat.torch import CAST, ValuelessTensor, replace_tensors, tree_leaves, tree_map

aten = torch.ops.aten
# what gives the runs of a flat part: (start, end) -> (tensor, its start, its end) in order
Runs = Callable[[int, int], Iterator[tuple[Tensor, int, int]]]
SAME = (aten.clone.default, CAST)
BLANK = {"empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full"}


class Deferred(ValuelessTensor):
    """A tensor on the CPU whose values are computed on request.

    Functions of it are deferred too. A function that needs the values at once, such as `item`, computes them. A
    function that would change them in place raises RuntimeError, because the change would be lost.
    """

    def __init__(self, outline: Tensor, compute: Callable[[], Tensor], runs: Runs | None = None):
        """outline: a tensor with the shape, strides and dtype. compute: gives all values. runs: of which parts of other
        tensors a part of the values consists, in order; None: `compute` reads no more than is used of its result."""
        self.compute, self.runs = compute, runs

    def __repr__(self) -> str:
        return f"Deferred({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, function, _, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (aten.detach.default, aten.alias.default):
            return cls(_outline(args[0]), args[0].compute, args[0].runs)
        if any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments):
            raise RuntimeError(f"{function} would change a weight that is not read yet; call `settle` before it")
        if function._schema.name.removeprefix("aten::") in BLANK:
            return function(*tree_map(_blank, args), **kwargs)

        def compute() -> Tensor | Sequence[Tensor]:
            return function(*tree_map(whole, args), **tree_map(whole, kwargs))

        elsewhere = torch.device(kwargs.get("device") or "cpu").type != "cpu"
        outline = None if elsewhere else _outline_of(function, args, kwargs)
        if isinstance(outline, Tensor):
            return cls(outline, compute, _runs(function, args, kwargs, outline))
        if outline is not None and tree_leaves(outline) == list(outline):
            return [cls(o, _Item(compute, i), _split_runs(function, args, i, outline)) for i, o in enumerate(outline)]
        return compute()


class _Item:
    """One of the tensors that a function returns."""

    def __init__(self, compute: Callable[[], Sequence[Tensor]], number: int):
        self.compute, self.number = compute, number

    def __call__(self) -> Tensor:
        return self.compute()[self.number]


class _Mapped:
    """A tensor of a file that is mapped into memory; nothing of it is read before it is used."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __call__(self) -> Tensor:
        return self.tensor


def of_file(mapped: Tensor) -> Deferred:
    """A tensor of a weight file. mapped: the tensor as a view of the file, which is mapped into memory."""
    return Deferred(mapped, _Mapped(mapped))


def settle_mapped(module: nn.Module) -> None:
    """Put those weights in place that are views of a mapped file, and all buffers. That reads no weight."""

    def values(tensor: Tensor) -> Tensor:
        at_once = isinstance(tensor, Deferred) and (
            isinstance(tensor.compute, _Mapped) or not isinstance(tensor, nn.Parameter)
        )
        return in_place_of(tensor, whole(tensor)) if at_once else tensor

    replace(module, values)


def whole(value):
    """All values of a deferred tensor; anything else as it is."""
    return value.compute() if isinstance(value, Deferred) else value


def read(tensor: Tensor, start: int, end: int, out: Tensor) -> None:
    """Write elements `start` to `end` of a flattened tensor into `out` [end - start], of any dtype and device."""
    if end <= start:
        return
    if isinstance(tensor, Deferred) and tensor.runs is not None:
        if out.dtype != tensor.dtype:  # two roundings, where the file has a third type
            exact = torch.empty(end - start, dtype=tensor.dtype)
            read(tensor, start, end, exact)
            out.copy_(exact)
            return
        done = 0
        for source, first, last in tensor.runs(start, end):
            read(source, first, last, out[done : done + last - first])
            done += last - first
        return
    values = whole(tensor.detach())
    if values.is_contiguous():
        out.copy_(values.view(-1)[start:end])
        return
    row = math.prod(values.shape[1:])
    first = start // row
    rows = values[first : -(-end // row)].reshape(-1)
    out.copy_(rows[start - first * row : end - first * row])


@torch.no_grad()
def settle(
    module: nn.Module,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    only: Iterable[Tensor] | None = None,
) -> nn.Module:
    """Put the values of the deferred weights of a module in place; returns the module.

    They go to `device`, one at a time. dtype: of those with floating-point values; None keeps each one's own. only: the
    weights to settle, None for all.
    """
    chosen = None if only is None else {id(tensor) for tensor in only}

    def settled(tensor: Tensor) -> Tensor:
        asked = isinstance(tensor, Deferred) and (chosen is None or id(tensor) in chosen)
        return in_place_of(tensor, settled_values(tensor, device, dtype)) if asked else tensor

    replace(module, settled)
    return module


def settled_values(tensor: Deferred, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
    """All values of a deferred tensor on a device; see `settle`."""
    target = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
    if target == tensor.dtype:
        return whole(tensor).to(device).contiguous()
    out = torch.empty(tensor.shape, dtype=target, device=device)
    read(tensor, 0, tensor.numel(), out.view(-1))
    return out


def replace(module: nn.Module, new: Callable[[Tensor], Tensor]) -> None:
    """Replace parameters and buffers of a module, in its order. Tied ones stay tied.

    new: gives the parameter or buffer that takes the place of one; it may give back the same.
    """
    done: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, so that no other gets its id

    def once(old: Tensor) -> Tensor:
        if id(old) not in done:
            done[id(old)] = old, new(old)
        return done[id(old)][1]

    for owner in module.modules():
        replace_tensors(owner, once)


def in_place_of(old: Tensor, values: Tensor) -> Tensor:
    """`values` as a parameter or buffer with what is marked on the old one: its gradient's need, its attributes."""
    values = nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values
    values.__dict__.update({k: v for k, v in old.__dict__.items() if k not in ("compute", "runs", "_is_param")})
    return values


def _outline_of(function, args, kwargs):
    """What a function of deferred tensors returns, on the meta device; None where that depends on the values."""
    kwargs = {name: "meta" if name == "device" else _outline(value) for name, value in kwargs.items()}
    try:
        found = function(*tree_map(_outline, args), **kwargs)
    except (RuntimeError, NotImplementedError):
        return None
    return found if isinstance(found, (Tensor, list, tuple)) else None


def _outline(value):
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _blank(value):
    """Memory of a deferred tensor's size, of which nothing is used before it is written."""
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Deferred) else value


def _runs(function, args, kwargs, outline: Tensor) -> Runs | None:
    """The runs of what a function returns, for functions that only arrange or cast elements."""
    if function in SAME:
        return lambda start, end: iter([(args[0], start, end)])
    if function in (aten.stack.default, aten.cat.default):
        tensors = args[0]
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % outline.dim()
        if any(t.dtype != outline.dtype for t in tensors):
            return None
        return _joined(tensors, math.prod(outline.shape[:dim]))
    if function is aten.slice.Tensor:
        source, dim, start, _, step = (*args, *(0, None, None, 1)[len(args) - 1 :])[:5]
        if step != 1 or not source.is_contiguous():
            return None
        first, _, _ = slice(start, None).indices(source.shape[dim])
        return _narrowed(source, dim, first, outline.shape[dim])
    return None


def _split_runs(function, args, number: int, outline: Sequence[Tensor]) -> Runs | None:
    """The runs of one of the tensors that a split returns."""
    if function not in (aten.split.Tensor, aten.split_with_sizes.default) or not args[0].is_contiguous():
        return None
    dim = args[2] if len(args) > 2 else 0
    return _narrowed(args[0], dim, sum(o.shape[dim] for o in outline[:number]), outline[number].shape[dim])


def _joined(tensors: Sequence[Tensor], outer: int) -> Runs:
    """Runs of tensors that were joined in a dimension before which there are `outer` places."""
    lengths = [t.numel() // outer for t in tensors]
    period = sum(lengths)

    def runs(start: int, end: int) -> Iterator[tuple[Tensor, int, int]]:
        for place in range(start // period, -(-end // period)):
            at = place * period
            for tensor, length in zip(tensors, lengths, strict=True):
                first, last = max(start, at), min(end, at + length)
                if first < last:
                    yield tensor, place * length + first - at, place * length + last - at
                at += length

    return runs


def _narrowed(source: Tensor, dim: int, first: int, count: int) -> Runs:
    """Runs of `count` places from `first` of a dimension of a contiguous tensor."""
    dim %= source.dim()
    inner = math.prod(source.shape[dim + 1 :])
    length, stride, offset = count * inner, source.shape[dim] * inner, first * inner

    def runs(start: int, end: int) -> Iterator[tuple[Tensor, int, int]]:
        for place in range(start // length, -(-end // length)):
            at = place * length
            low, high = max(start, at) - at, min(end, at + length) - at
            yield source, place * stride + offset + low, place * stride + offset + high

    return runs
