"""AdamW (Loshchilov & Hutter, arXiv:1711.05101) over the kept weights of a pruned parameter, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_llm.compat.torch import adamw

from ._triton import jit, launch_on, tl, uses_triton
from .compile_check import CompileSpec
from .packed_mask import BYTES, INDEX_BLOCK, PackedMask, packed_positions, row_tile

ADAM_BLOCK = 1024  # values per program
ADAM_CPU_BLOCK = 1 << 16  # values whose float32 copies exist at a time on the CPU

# --- torch reference


def adamw_reference(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """In float32 (float64 for float64 values), a block at a time; torch's own kernel where all dtypes agree."""
    tensors = [values, grad, exp_avg, exp_avg_sq]
    if master is None and len({t.dtype for t in tensors}) == 1 and values.dtype in (torch.float32, torch.float64):
        count = torch.tensor(step - 1.0)  # torch counts this step itself
        options = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        lists = [[t] for t in tensors]
        adamw(*lists, [], [count], fused=values.numel() > 0, amsgrad=False, maximize=False, **options)
        return
    acc = torch.promote_types(values.dtype, torch.float32)
    for i in range(0, values.numel(), ADAM_CPU_BLOCK):
        block = slice(i, i + ADAM_CPU_BLOCK)
        source = values if master is None else master
        p, g, m, v = (t[block].to(acc) for t in (source, grad, exp_avg, exp_avg_sq))
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
        p.mul_(1 - lr * weight_decay).addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
        for target, new in ((values, p), (exp_avg, m), (exp_avg_sq, v), (master, p)):
            if target is not None:
                target[block] = new


# --- Triton kernels


@jit
def _adamw_step(p, g, m, v, rate, decay, mix1, mix2, root2, eps):
    """rate = lr / (1 - beta1^t), decay = lr * weight_decay, mix = 1 - beta, root2 = sqrt(1 - beta2^t)."""
    m += mix1 * (g - m)
    v += mix2 * (g * g - v)
    p -= decay * p + rate * m / (tl.sqrt_rn(v) / root2 + eps)
    return p, m, v


@jit
def _adamw_kernel(
    values,
    grad,
    exp_avg,
    exp_avg_sq,
    master,
    count,
    rate,
    decay,
    mix1,
    mix2,
    root2,
    eps,
    MASTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    source = master if MASTER else values
    p = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + at, mask=mask, other=0.0).to(tl.float32)
    p, m, v = _adamw_step(p, g, m, v, rate, decay, mix1, mix2, root2, eps)
    tl.store(values + at, p.to(values.dtype.element_ty), mask=mask)
    tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=mask)
    if MASTER:
        tl.store(master + at, p, mask=mask)


@jit
def _adamw_dense_kernel(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    bits,
    columns,
    row_bytes,
    rate,
    decay,
    mix1,
    mix2,
    root2,
    eps,
    BYTES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    word = tl.load(bits + row * row_bytes + byte, mask=byte < row_bytes, other=0).to(tl.int32)
    kept = ((word[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0
    column = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    # whole tiles are loaded and stored, pruned weights as they were: wide accesses need a mask that does not vary
    at, mask = row * columns + column, column < columns
    p = tl.load(param + at, mask=mask, other=0.0)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + at, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=mask, other=0.0)
    new_p, new_m, new_v = _adamw_step(
        p.to(tl.float32), g, m.to(tl.float32), v.to(tl.float32), rate, decay, mix1, mix2, root2, eps
    )
    tl.store(param + at, tl.where(kept, new_p.to(p.dtype), p), mask=mask)
    tl.store(exp_avg + at, tl.where(kept, new_m.to(m.dtype), m), mask=mask)
    tl.store(exp_avg_sq + at, tl.where(kept, new_v.to(v.dtype), v), mask=mask)


def _scalars(step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> tuple:
    """What the kernels take, computed in float64: 1 - 0.999 has three right digits in float32."""
    return lr / (1 - beta1**step), lr * weight_decay, 1 - beta1, 1 - beta2, (1 - beta2**step) ** 0.5, eps


def adamw_triton(values, grad, exp_avg, exp_avg_sq, master, *options) -> None:
    n = values.numel()
    if n:
        with launch_on(values):
            _adamw_kernel[(-(-n // ADAM_BLOCK),)](
                values,
                grad.contiguous(),
                exp_avg,
                exp_avg_sq,
                values if master is None else master,
                n,
                *_scalars(*options),
                MASTER=master is not None,
                BLOCK=ADAM_BLOCK,
            )


def adamw_dense_triton(param, grad, exp_avg, exp_avg_sq, bits, columns, *options) -> None:
    if param.numel():
        tile = row_tile(bits.shape[1])
        with launch_on(param):
            _adamw_dense_kernel[(bits.shape[0], -(-bits.shape[1] // tile))](
                param,
                grad.contiguous(),
                exp_avg,
                exp_avg_sq,
                bits,
                columns,
                bits.shape[1],
                *_scalars(*options),
                BYTES=tile,
            )


def compile_specs() -> list[CompileSpec]:
    specs = []
    for dtype in ("bf16", "fp16", "fp32"):
        x = f"*{dtype}"
        scalars = dict.fromkeys(("rate", "decay", "mix1", "mix2", "root2", "eps"), "fp32")
        states = {"grad": x, "exp_avg": "*fp32", "exp_avg_sq": "*fp32"} | scalars
        for master in (False, True):
            signature = {"values": x, "master": "*fp32" if master else x, "count": "i64"} | states
            constants = {"MASTER": master, "BLOCK": ADAM_BLOCK}
            specs.append(CompileSpec(f"adamw {dtype} master={master}", _adamw_kernel, signature, constants))
        signature = {"param": x, "bits": "*u8", "columns": "i32", "row_bytes": "i32"} | states
        specs.append(CompileSpec(f"adamw dense {dtype}", _adamw_dense_kernel, signature, {"BYTES": BYTES}))
    return specs


# --- torch.library


@torch.library.custom_op("ds_llm::masked_adamw", mutates_args=("values", "exp_avg", "exp_avg_sq", "master"))
def _masked_adamw(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    run = adamw_triton if uses_triton(values) else adamw_reference
    run(values, grad, exp_avg, exp_avg_sq, master, step, lr, beta1, beta2, eps, weight_decay)


@torch.library.custom_op("ds_llm::masked_adamw_dense", mutates_args=("param", "exp_avg", "exp_avg_sq"))
def _masked_adamw_dense(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    bits: Tensor,
    positions: Tensor | None,
    nnz: int,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    options = (step, lr, beta1, beta2, eps, weight_decay)
    columns = param.shape[-1]
    if uses_triton(param):
        adamw_dense_triton(param, grad, exp_avg, exp_avg_sq, bits, columns, *options)
        return
    if positions is None:
        positions = packed_positions(bits, nnz, columns)
    flat = [t.reshape(-1) for t in (param, grad, exp_avg, exp_avg_sq)]
    for i in range(0, nnz, INDEX_BLOCK):
        index = positions[i : i + INDEX_BLOCK].long()
        kept = [t.index_select(0, index) for t in flat]
        adamw_reference(*kept, None, *options)
        for target, new in zip(flat, kept, strict=True):
            if target is not flat[1]:
                target.index_copy_(0, index, new)


# --- public functions


def _check(step: int, names: str, *tensors: Tensor | None) -> None:
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")
    for name, t in zip(names.split(), tensors, strict=True):
        if t is not None and (t.shape != tensors[0].shape or t.device != tensors[0].device):
            raise ValueError(f"{name} {list(t.shape)} on {t.device} does not match {list(tensors[0].shape)}")
        if t is not None and not t.is_contiguous() and name != "grad":
            raise ValueError(f"{name} must be contiguous: it is updated in place")


@torch.no_grad()
def masked_adamw_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    master: Tensor | None = None,
) -> None:
    """One AdamW step, in place and in one pass over the kept values; equal to torch.optim.AdamW on `values`.

    values, grad, exp_avg, exp_avg_sq [nnz], of any floating dtypes; the arithmetic is float32. master: float32 copy of
    `values`, updated and rounded into them, without which updates below a bf16 value's precision are lost. step counts
    from 1. Bytes per kept value in bf16 with float32 states: 2 + 2 + 4 + 4 read and 2 + 4 + 4 written, 4 + 4 more with
    a master copy (which replaces the read of `values`).
    """
    _check(step, "values grad exp_avg exp_avg_sq master", values, grad, exp_avg, exp_avg_sq, master)
    _masked_adamw(values, grad, exp_avg, exp_avg_sq, master, step, lr, beta1, beta2, eps, weight_decay)


@torch.no_grad()
def masked_adamw_dense_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    mask: PackedMask,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> None:
    """One AdamW step, in place, on the kept weights of a dense parameter of `mask.shape`.

    Pruned weights and their states stay bitwise as they are, NaN included. Options as in `masked_adamw_`.
    """
    _check(step, "param grad exp_avg exp_avg_sq", param, grad, exp_avg, exp_avg_sq)
    if param.shape != mask.shape:
        raise ValueError(f"the mask is {list(mask.shape)}, got a parameter {list(param.shape)}")
    options = (step, lr, beta1, beta2, eps, weight_decay)
    _masked_adamw_dense(param, grad, exp_avg, exp_avg_sq, mask.bits, mask.positions(), mask.nnz, *options)
