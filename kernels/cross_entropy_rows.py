"""Cross-entropy of rows of logits, whose gradient is written over them.

On a GPU one Triton launch reads the logits twice, the second time mostly from the L2 cache, and writes their gradient:
2 b bytes per logit of b bytes that must move.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, launch_on, next_power_of_2, tl, uses_triton
from .compile_check import CompileSpec

ROW_BLOCK = 16  # rows handled at a time on the CPU: their float32 logits stay in the cache
VOCAB_BLOCK = 4096  # logits per step of a program: 16 for each of 256 threads, two 16-byte loads of bfloat16


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# --- torch reference


def _rows_reference(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    z_loss: float,
    upstream: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Loss [T] of `logits` [T, V]; with `scale`, they are overwritten by scale * upstream * dloss/dlogits."""
    acc = accumulate_dtype(logits.dtype)
    losses = torch.empty(logits.shape[0], dtype=acc, device=logits.device)
    for i in range(0, logits.shape[0], ROW_BLOCK):
        block = logits[i : i + ROW_BLOCK]
        x, column = block.to(acc), labels[i : i + ROW_BLOCK, None]
        if bias is not None:
            x = x.add_(bias)
        if softcap is not None:
            x = torch.tanh(x / softcap).mul_(softcap)
        cap = x.clone() if softcap is not None and scale is not None else None
        label_logit = x.gather(1, column).squeeze(1)
        m = x.amax(1)
        x = x.sub_(m[:, None]).exp_()
        s = x.sum(1)
        log_sum = s.log()
        lse = m + log_sum
        losses[i : i + ROW_BLOCK] = log_sum + (m - label_logit) + z_loss * lse.square()
        if scale is None:
            continue
        up = scale if upstream is None else scale * upstream[i : i + ROW_BLOCK]
        x.mul_((up * (1 + 2 * z_loss * lse) / s)[:, None])
        x.scatter_add_(1, column, torch.full_like(label_logit, -1.0).mul_(up)[:, None])
        if cap is not None:
            x.mul_(1 - (cap / softcap).square())
        if x.data_ptr() != block.data_ptr():
            block.copy_(x)
    return losses


# --- Triton kernel


def vocab_block(vocabulary: int) -> tuple[int, int]:
    """Logits per step of a program, and its warps: 16 logits for each thread."""
    block = max(64, min(VOCAB_BLOCK, next_power_of_2(vocabulary)))
    return block, max(1, block // 512)


@jit
def capped(logit, bias, mask, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """The logits at pointers `logit` in float32, with bias and soft cap; -inf where `mask` is false."""
    x = tl.load(logit, mask=mask, other=float("-inf")).to(tl.float32)
    if BIAS:
        x += tl.load(bias, mask=mask, other=0.0).to(tl.float32)
    if SOFTCAP:
        x = tl.where(mask, softcap * (2 * tl.sigmoid(2 * x / softcap) - 1), float("-inf"))
    return x


@jit
def _cross_entropy_kernel(
    logits,
    labels,
    bias,
    upstream,
    losses,
    row_stride,
    vocabulary,
    softcap,
    z_loss,
    scale,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UPSTREAM: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    label = tl.load(labels + row)
    inside = (label >= 0) & (label < vocabulary)
    target = capped(logits + label, bias + label, inside, softcap, BIAS, SOFTCAP)
    m = tl.full([], -1e30, tl.float32)  # not -inf: inf - inf is NaN
    s = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = capped(logits + column, bias + column, column < vocabulary, softcap, BIAS, SOFTCAP)
        top = tl.maximum(m, tl.max(x, 0))
        s = s * tl.exp(m - top) + tl.exp(x - top)
        m = top
    total = tl.sum(s, 0)
    log_sum = tl.log(total)
    lse = m + log_sum
    tl.store(losses + row, tl.where(inside, log_sum + (m - target) + z_loss * lse * lse, float("nan")))
    if GRADIENT:
        if UPSTREAM:
            scale *= tl.load(upstream + row)
        factor = scale * (1 + 2 * z_loss * lse) / total
        # every thread has read the label's logit by now: the reductions above are barriers
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < vocabulary
            x = capped(logits + column, bias + column, mask, softcap, BIAS, SOFTCAP)
            g = tl.exp(x - m) * factor - tl.where(column == label, scale, 0.0)
            if SOFTCAP:
                g *= 1 - (x / softcap) * (x / softcap)
            tl.store(logits + column, g.to(logits.dtype.element_ty), mask=mask)


def rows_triton(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    z_loss: float,
    upstream: Tensor | None,
    scale: float | None,
) -> Tensor:
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    block, warps = vocab_block(logits.shape[1])
    if len(losses):
        with launch_on(logits):
            _cross_entropy_kernel[(len(losses),)](
                logits,
                labels,
                logits if bias is None else bias,
                losses if upstream is None else upstream,
                losses,
                logits.stride(0),
                logits.shape[1],
                1.0 if softcap is None else softcap,
                z_loss,
                1.0 if scale is None else scale,
                BIAS=bias is not None,
                SOFTCAP=softcap is not None,
                UPSTREAM=upstream is not None,
                GRADIENT=scale is not None,
                BLOCK=block,
                num_warps=warps,
            )
    return losses


def compile_specs() -> list[CompileSpec]:
    specs = []
    sizes = {"row_stride": "i64", "vocabulary": "i32"} | dict.fromkeys(("softcap", "z_loss", "scale"), "fp32")
    for dtype in ("bf16", "fp16", "fp32"):
        tensors = {"logits": f"*{dtype}", "bias": f"*{dtype}", "labels": "*i64", "upstream": "*fp32", "losses": "*fp32"}
        for vocabulary in (1000, 151936):
            block, warps = vocab_block(vocabulary)
            for name, bias, softcap, upstream, gradient in (
                ("loss", False, False, False, False),
                ("loss and gradient", False, False, False, True),
                ("bias softcap gradient", True, True, True, True),
            ):
                constants = {"BIAS": bias, "SOFTCAP": softcap, "UPSTREAM": upstream, "GRADIENT": gradient}
                label = f"cross-entropy {dtype} V={vocabulary} {name}"
                constants["BLOCK"] = block
                specs.append(CompileSpec(label, _cross_entropy_kernel, tensors | sizes, constants, num_warps=warps))
    return specs


# --- by device


def cross_entropy_rows(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    z_loss: float,
    upstream: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Loss [T] of softcap(logits [T, V] + bias [V]) against labels [T], plus z_loss * logsumexp^2.

    With `scale`, the logits are overwritten by scale * upstream [T] * dloss/dlogits; without, their
    contents are lost.
    """
    compute = rows_triton if uses_triton(logits) else _rows_reference
    return compute(logits, labels, bias, softcap, z_loss, upstream, scale)
