"""Compact storage of pruned weights: the kept values as one vector, a bit mask, and a fused AdamW over them.

`expand` and `compact` move between values [nnz] and a dense [R, C] weight, each being the other's gradient, so a layer
whose only trainable parameter is the vector of kept values has gradients, optimizer states and communication of that
size. Bytes per weight at density d, elements of b bytes: d b + 1/8 read and b written by `expand`, b + 1/8 read and d b
written by `compact`, plus 8 per row of offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import masked_adamw
from ._triton import jit, launch_on, tl, uses_triton
from .compile_check import CompileSpec
from .masked_adamw import masked_adamw_, masked_adamw_dense_
from .packed_mask import BYTES, INDEX_BLOCK, PackedMask, packed_positions, row_tile

__all__ = ["PackedMask", "compact", "expand", "expand_into", "masked_adamw_", "masked_adamw_dense_"]

# --- torch reference


def expand_reference(values: Tensor, positions: Tensor, rows: int, columns: int) -> Tensor:
    dense = torch.zeros(rows * columns, dtype=values.dtype, device=values.device)
    return _put(values, positions, dense).view(rows, columns)


def _put(values: Tensor, positions: Tensor, dense: Tensor) -> Tensor:
    for i in range(0, len(positions), INDEX_BLOCK):
        part = slice(i, i + INDEX_BLOCK)
        dense.index_copy_(0, positions[part].long(), values[part])
    return dense


def compact_reference(dense: Tensor, positions: Tensor) -> Tensor:
    return dense.reshape(-1).index_select(0, positions)


# --- Triton kernels


@jit
def _places(bits, byte, row_bytes):
    """For a tile [BYTES, 8] of weights: 1 where kept, the rank of each among the tile's kept ones, and their number."""
    word = tl.load(bits + byte, mask=byte < row_bytes, other=0).to(tl.int32)
    bit = (word[:, None] >> tl.arange(0, 8)[None, :]) & 1
    count = tl.sum(bit, 1)
    before = tl.cumsum(count, 0) - count
    return bit, before[:, None] + tl.cumsum(bit, 1) - bit, tl.sum(count, 0)


@jit
def _expand_kernel(values, bits, offsets, dense, columns, row_bytes, BYTES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    values += tl.load(offsets + row)
    bits += row * row_bytes
    dense += row * columns
    for start in range(0, row_bytes, BYTES):
        byte = start + tl.arange(0, BYTES)
        bit, place, count = _places(bits, byte, row_bytes)
        column = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
        x = tl.load(values + place, mask=bit != 0, other=0.0)
        tl.store(dense + column, x, mask=column < columns)
        values += count


@jit
def _compact_kernel(dense, bits, offsets, values, row_stride, column_stride, columns, row_bytes, BYTES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    values += tl.load(offsets + row)
    bits += row * row_bytes
    dense += row * row_stride
    for start in range(0, row_bytes, BYTES):
        byte = start + tl.arange(0, BYTES)
        bit, place, count = _places(bits, byte, row_bytes)
        column = (byte[:, None] * 8 + tl.arange(0, 8)[None, :]).to(tl.int64)
        # the whole tile rather than its kept weights: every line is touched anyway, and wide loads need a plain mask
        x = tl.load(dense + column * column_stride, mask=column < columns)
        tl.store(values + place, x, mask=bit != 0)
        values += count


def expand_triton(values: Tensor, bits: Tensor, offsets: Tensor, columns: int) -> Tensor:
    dense = torch.empty(bits.shape[0], columns, dtype=values.dtype, device=values.device)
    if dense.numel():
        with launch_on(values):
            _expand_kernel[(bits.shape[0],)](
                values.contiguous(), bits, offsets, dense, columns, bits.shape[1], BYTES=row_tile(bits.shape[1])
            )
    return dense


def compact_triton(dense: Tensor, bits: Tensor, offsets: Tensor, nnz: int) -> Tensor:
    values = torch.empty(nnz, dtype=dense.dtype, device=dense.device)
    if nnz:
        with launch_on(dense):
            _compact_kernel[(bits.shape[0],)](
                dense,
                bits,
                offsets,
                values,
                *dense.stride(),
                dense.shape[1],
                bits.shape[1],
                BYTES=row_tile(bits.shape[1]),
            )
    return values


def compile_specs() -> list[CompileSpec]:
    specs = []
    for dtype in ("bf16", "fp16", "fp32"):
        x = f"*{dtype}"
        for tile in (32, BYTES):
            rows = {"bits": "*u8", "offsets": "*i64", "row_bytes": "i32"}
            signature = {"values": x, "dense": x, "columns": "i32"} | rows
            specs.append(CompileSpec(f"expand {dtype} {8 * tile}", _expand_kernel, signature, {"BYTES": tile}))
            for stride in ("1", "i64"):
                constants = {"BYTES": tile} | ({"column_stride": 1} if stride == "1" else {})
                signature = {
                    "values": x,
                    "dense": x,
                    "row_stride": "i64",
                    "column_stride": "i64",
                    "columns": "i32",
                } | rows
                name = f"compact {dtype} {8 * tile} column stride {stride}"
                specs.append(CompileSpec(name, _compact_kernel, signature, constants))
    return specs + masked_adamw.compile_specs()


# --- torch.library


@torch.library.custom_op("ds_llm::sparse_expand", mutates_args=())
def sparse_expand(values: Tensor, bits: Tensor, offsets: Tensor, positions: Tensor | None, columns: int) -> Tensor:
    if uses_triton(values):
        return expand_triton(values, bits, offsets, columns)
    if positions is None:
        positions = packed_positions(bits, values.shape[0], columns)
    return expand_reference(values, positions, bits.shape[0], columns)


@sparse_expand.register_fake
def _(values, bits, offsets, positions, columns):
    return values.new_empty(bits.shape[0], columns)


@torch.library.custom_op("ds_llm::sparse_compact", mutates_args=())
def sparse_compact(dense: Tensor, bits: Tensor, offsets: Tensor, positions: Tensor | None, nnz: int) -> Tensor:
    if uses_triton(dense):
        return compact_triton(dense, bits, offsets, nnz)
    if positions is None:
        positions = packed_positions(bits, nnz, dense.shape[1])
    return compact_reference(dense, positions)


@sparse_compact.register_fake
def _(dense, bits, offsets, positions, nnz):
    return dense.new_empty(nnz)


def _save_mask(ctx, inputs, output):
    x, bits, offsets, positions, _ = inputs
    ctx.save_for_backward(bits, offsets, positions)
    ctx.size = x.shape[-1]


def _expand_backward(ctx, grad):
    return sparse_compact(grad, *ctx.saved_tensors, ctx.size), None, None, None, None


def _compact_backward(ctx, grad):
    return sparse_expand(grad, *ctx.saved_tensors, ctx.size), None, None, None, None


sparse_expand.register_autograd(_expand_backward, setup_context=_save_mask)
sparse_compact.register_autograd(_compact_backward, setup_context=_save_mask)


# --- public functions


def expand(values: Tensor, mask: PackedMask) -> Tensor:
    """The dense weight of `mask.shape` with `values` [nnz], in row-major order, at the kept places and 0 elsewhere.

    Same dtype and device as `values`. The gradient of `values` is `compact` of the dense gradient. Raises ValueError
    when the number of values is not the mask's.
    """
    if values.shape != (mask.nnz,):
        raise ValueError(f"the mask keeps {mask.nnz} weights, got values {list(values.shape)}")
    dense = sparse_expand(values, mask.bits, mask.offsets, mask.positions(), mask.shape[-1])
    return dense.view(mask.shape)


@torch.no_grad()
def expand_into(dense: Tensor, values: Tensor, mask: PackedMask) -> Tensor:
    """`expand` into CPU memory that is there already: `dense`, contiguous, of `mask.shape`; returns it.

    Without a gradient. Memory that is used again costs half as much to fill on a CPU as memory fresh from the system.
    """
    _put(values, mask.positions(), dense.view(-1).zero_())
    return dense


def compact(dense: Tensor, mask: PackedMask) -> Tensor:
    """The kept values [nnz] of `dense` (shape `mask.shape`, any strides), in row-major order.

    The gradient of `dense` is `expand` of the values' gradient. Raises ValueError when the shapes differ.
    """
    if dense.shape != mask.shape:
        raise ValueError(f"expected {list(mask.shape)}, got {list(dense.shape)}")
    rows = dense.reshape(mask.shape[:-1].numel(), mask.shape[-1])
    return sparse_compact(rows, mask.bits, mask.offsets, mask.positions(), mask.nnz)
