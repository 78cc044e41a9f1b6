"""Moving tokens to the rows of their experts and back, in copies that read every row once.

`permute` reads each token's row once and writes it K times; `unpermute` reads K rows and writes one. Both move
(1 + K) H elements per token, and each is the other's gradient. No step adds with atomics to a floating-point number, so
results do not vary between runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import moe_sort
from ._triton import jit, launch_on, next_power_of_2, tl, uses_triton

ROW_BLOCK = 2048  # elements of a row per step
CHUNK = 1 << 18  # elements that the reference handles at a time, so that its copies stay in the processor's cache


# --- torch reference


def _scatter_reference(x: Tensor, inverse: Tensor) -> Tensor:
    """Rows [T * K, H] with the token's row at the row of each choice; zero at the rows of masked choices."""
    top_k = inverse.shape[1]
    order = torch.empty(inverse.numel(), dtype=torch.int64, device=x.device)
    place = torch.where(inverse < 0, ~inverse, inverse).view(-1)
    order.scatter_(0, place.long(), torch.arange(order.numel(), device=x.device))
    rows = x.index_select(0, order // max(1, top_k))
    masked = inverse < 0
    if masked.any():
        rows[masked.numel() - int(masked.sum()) :] = 0
    return rows


def _gather_reference(rows: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
    """Sum over each token's choices of weight x row, in float32."""
    tokens, top_k = inverse.shape
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = rows.new_empty(tokens, rows.shape[1])
    for i in range(0, tokens, _chunk(rows.shape[1])):
        part = slice(i, i + _chunk(rows.shape[1]))
        masked = inverse[part] < 0
        place = inverse[part].clamp_min(0)
        total = torch.zeros(place.shape[0], rows.shape[1], dtype=wide, device=rows.device)
        for k in range(top_k):
            picked = rows.index_select(0, place[:, k]).to(wide)
            if masked[:, k].any():  # what stands in the row of a masked choice is not defined
                picked.masked_fill_(masked[:, k, None], 0.0)
            if weights is None:
                total += picked
            else:
                total.addcmul_(picked, weights[part, k, None].to(wide))
        out[part] = total
    return out


def _chunk(width: int) -> int:
    return max(1, CHUNK // max(1, width))


def _gather_backward_reference(grad: Tensor, rows: Tensor, inverse: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    tokens, top_k = inverse.shape
    wide = torch.promote_types(rows.dtype, torch.float32)
    rows_grad = rows.new_empty(rows.shape)
    weights_grad = torch.empty(tokens, top_k, dtype=wide, device=rows.device)
    masked = inverse < 0
    place = torch.where(masked, ~inverse, inverse).long()
    weights = weights.to(wide).masked_fill(masked, 0.0)
    for i in range(0, tokens, _chunk(rows.shape[1])):
        part = slice(i, i + _chunk(rows.shape[1]))
        g = grad[part].to(wide)
        for k in range(top_k):
            row = rows.index_select(0, place[part, k]).to(wide)
            torch.sum(row.mul_(g), -1, out=weights_grad[part, k])
            rows_grad.index_copy_(0, place[part, k], torch.mul(g, weights[part, k, None], out=row).to(rows.dtype))
    return rows_grad, weights_grad.masked_fill_(masked, 0.0)


# --- Triton kernels


@jit
def _scatter_kernel(x, inverse, rows, x_t, x_h, WIDTH: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """rows[inverse[t, k]] = x[t]; zero where masked."""
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        row = tl.load(x + token * x_t + column.to(tl.int64) * x_h, mask=inside, other=0.0)
        for k in tl.static_range(TOP_K):
            place = tl.load(inverse + token * TOP_K + k).to(tl.int64)
            value = tl.where(place < 0, 0.0, row)
            place = tl.where(place < 0, -1 - place, place)
            tl.store(rows + place * WIDTH + column, value, mask=inside)


@jit
def _gather_kernel(
    rows,
    inverse,
    weights,
    out,
    rows_n,
    rows_h,
    w_t,
    w_k,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t] = sum over k of (weights[t, k]) rows[inverse[t, k]]; masked choices add nothing and are not read."""
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(TOP_K):
            place = tl.load(inverse + token * TOP_K + k).to(tl.int64)
            read = tl.where(place >= 0, column < WIDTH, False)
            row = tl.load(rows + place * rows_n + column.to(tl.int64) * rows_h, mask=read, other=0.0).to(tl.float32)
            if WEIGHTED:
                row *= tl.load(weights + token * w_t + k * w_k)
            total += tl.where(read, row, 0.0)
        tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=column < WIDTH)


@jit
def _gather_backward_kernel(
    grad,
    rows,
    inverse,
    weights,
    rows_grad,
    weights_grad,
    grad_t,
    grad_h,
    rows_n,
    rows_h,
    w_t,
    w_k,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Both gradients of the weighted sum, each row of grad and rows read once."""
    token = tl.program_id(0).to(tl.int64)
    grad += token * grad_t
    inverse += token * TOP_K
    weights += token * w_t
    choice = tl.arange(0, BLOCK_K)
    dot = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        g = tl.load(grad + column.to(tl.int64) * grad_h, mask=inside, other=0.0).to(tl.float32)
        for k in tl.static_range(TOP_K):
            place = tl.load(inverse + k).to(tl.int64)
            read = tl.where(place >= 0, inside, False)
            row = tl.load(rows + place * rows_n + column.to(tl.int64) * rows_h, mask=read, other=0.0).to(tl.float32)
            dot += tl.where(choice == k, tl.sum(tl.where(read, g * row, 0.0), 0), 0.0)
            value = tl.where(place < 0, 0.0, g * tl.load(weights + k * w_k))
            place = tl.where(place < 0, -1 - place, place)
            tl.store(rows_grad + place * WIDTH + column, value.to(rows_grad.dtype.element_ty), mask=inside)
    tl.store(weights_grad + token * TOP_K + choice, dot, mask=choice < TOP_K)


def _row_config(width: int) -> tuple[int, int]:
    """Elements per step and warps: 16 bytes per thread and load."""
    block = min(ROW_BLOCK, next_power_of_2(width))
    return block, min(8, max(1, block // 256))


def scatter_triton(x: Tensor, inverse: Tensor) -> Tensor:
    tokens, top_k = inverse.shape
    rows = x.new_empty(tokens * top_k, x.shape[1])
    if rows.numel():
        block, warps = _row_config(x.shape[1])
        with launch_on(x):
            _scatter_kernel[(tokens,)](
                x, inverse, rows, *x.stride(), WIDTH=x.shape[1], TOP_K=top_k, BLOCK=block, num_warps=warps
            )
    return rows


def gather_triton(rows: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
    tokens, top_k = inverse.shape
    out = rows.new_empty(tokens, rows.shape[1])
    if out.numel():
        block, warps = _row_config(rows.shape[1])
        with launch_on(rows):
            _gather_kernel[(tokens,)](
                rows,
                inverse,
                weights,
                out,
                *rows.stride(),
                *((0, 0) if weights is None else weights.stride()),
                WIDTH=rows.shape[1],
                TOP_K=top_k,
                WEIGHTED=weights is not None,
                BLOCK=block,
                num_warps=warps,
            )
    return out


def gather_backward_triton(grad: Tensor, rows: Tensor, inverse: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    tokens, top_k = inverse.shape
    rows_grad = rows.new_empty(rows.shape)
    weights_grad = torch.empty(tokens, top_k, dtype=torch.float32, device=rows.device)
    if weights_grad.numel():
        block, warps = _row_config(rows.shape[1])
        with launch_on(rows):
            _gather_backward_kernel[(tokens,)](
                grad,
                rows,
                inverse,
                weights,
                rows_grad,
                weights_grad,
                *grad.stride(),
                *rows.stride(),
                *weights.stride(),
                WIDTH=rows.shape[1],
                TOP_K=top_k,
                BLOCK_K=next_power_of_2(top_k),
                BLOCK=block,
                num_warps=warps,
            )
    return rows_grad, weights_grad


# --- operators and their gradients


@torch.library.custom_op("ds_llm::moe_scatter", mutates_args=())
def _scatter(x: Tensor, inverse: Tensor) -> Tensor:
    run = scatter_triton if uses_triton(x) else _scatter_reference
    return run(x, inverse)


@_scatter.register_fake
def _(x, inverse):
    return x.new_empty(inverse.shape[0] * inverse.shape[1], x.shape[1])


@torch.library.custom_op("ds_llm::moe_gather", mutates_args=())
def _gather(rows: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
    run = gather_triton if uses_triton(rows) else _gather_reference
    return run(rows, inverse, weights)


@_gather.register_fake
def _(rows, inverse, weights):
    return rows.new_empty(inverse.shape[0], rows.shape[1])


@torch.library.custom_op("ds_llm::moe_gather_backward", mutates_args=())
def _gather_backward_op(grad: Tensor, rows: Tensor, inverse: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    run = gather_backward_triton if uses_triton(rows) else _gather_backward_reference
    return run(grad, rows, inverse, weights)


@_gather_backward_op.register_fake
def _(grad, rows, inverse, weights):
    return rows.new_empty(rows.shape), weights.new_empty(
        weights.shape, dtype=torch.promote_types(rows.dtype, torch.float32)
    )


def _save_inverse(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx, grad):
    return _gather(grad, ctx.saved_tensors[0], None), None


def _save_sum(ctx, inputs, output):
    rows, inverse, weights = inputs
    # without weights the gradient needs no rows, and they are not kept alive for it
    ctx.save_for_backward(inverse, None if weights is None else rows, weights)


def _gather_backward(ctx, grad):
    inverse, rows, weights = ctx.saved_tensors
    if weights is None:
        return _scatter(grad, inverse), None, None
    rows_grad, weights_grad = _gather_backward_op(grad, rows, inverse, weights)
    return rows_grad, None, weights_grad.to(weights.dtype)


_scatter.register_autograd(_scatter_backward, setup_context=_save_inverse)
_gather.register_autograd(_gather_backward, setup_context=_save_sum)


# --- public functions


def permute(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copies each token of x [T, H] once per chosen expert, rows sorted by expert, stably.

    experts [T, K] holds integers; one outside 0 .. num_experts - 1 is a masked choice. Returns rows [T * K, H] in the
    dtype of x; offsets [E] int32, the end of each expert's rows (`offs` of `torch.nn.functional.grouped_mm`); inverse
    [T, K] int32, the row of each choice. A masked choice has inverse < 0; its row, `~inverse`, lies behind the last
    expert's, is zero, and its gradient is ignored. Differentiable in x.

    Raises ValueError when the shapes do not fit or T * K is past the range of int32.
    """
    if x.ndim != 2 or experts.ndim != 2 or x.shape[0] != experts.shape[0]:
        raise ValueError(f"x {tuple(x.shape)} and experts {tuple(experts.shape)} must be [T, H] and [T, K]")
    if experts.is_floating_point():
        raise ValueError(f"experts must be integers, not {experts.dtype}")
    if experts.shape[0] * experts.shape[1] >= 2**31:
        raise ValueError(f"{tuple(experts.shape)} choices are more than int32 can number: split the batch")
    offsets, inverse = moe_sort.sort(experts, num_experts)
    return _scatter(x, inverse), offsets, inverse


def unpermute(rows: Tensor, inverse: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over each token's choices of weight x row, accumulated in float32: [T, H] in the dtype of rows.

    rows [T * K, H], inverse [T, K] as `permute` returned it, weights [T, K] (1 where None). Masked choices add
    nothing; what stands in their rows is not read. Differentiable in rows and weights.
    """
    if rows.ndim != 2 or inverse.ndim != 2 or rows.shape[0] != inverse.shape[0] * inverse.shape[1]:
        raise ValueError(f"rows {tuple(rows.shape)} and inverse {tuple(inverse.shape)} must be [T * K, H] and [T, K]")
    if weights is not None and weights.shape != inverse.shape:
        raise ValueError(f"weights {tuple(weights.shape)} must have the shape of inverse, {tuple(inverse.shape)}")
    return _gather(rows, inverse, weights)


def compile_specs() -> list:
    """Configurations to compile ahead of time: the sort, then dtypes and widths of the copies."""
    from .compile_check import CompileSpec

    specs = moe_sort.compile_specs()
    for dtype in ("bf16", "fp16", "fp32"):
        for width, top_k in ((768, 2), (2048, 8), (4096, 4)):
            block, warps = _row_config(width)
            data = dict.fromkeys(["x", "rows", "out", "grad", "rows_grad"], f"*{dtype}")
            signature = data | dict.fromkeys(["weights", "weights_grad"], "*fp32") | {"inverse": "*i32"}
            signature |= dict.fromkeys(["x_t", "rows_n", "grad_t", "w_t"], "i32")
            constants = {"WIDTH": width, "TOP_K": top_k, "BLOCK": block}
            constants |= dict.fromkeys(["w_k", "x_h", "rows_h", "grad_h"], 1)
            for fn, name, variants in (
                (_scatter_kernel, "permute rows", ({},)),
                (_gather_kernel, "unpermute", ({"WEIGHTED": False, "weights": None}, {"WEIGHTED": True})),
                (_gather_backward_kernel, "unpermute backward", ({"BLOCK_K": next_power_of_2(top_k)},)),
            ):
                for variant in variants:
                    label = f"{name} {dtype} {width} top {top_k}{' weighted' * variant.get('WEIGHTED', False)}"
                    used = {n: v for n, v in (constants | variant).items() if n in fn.arg_names}
                    specs.append(CompileSpec(label, fn, signature, used, num_warps=warps))
    return specs
