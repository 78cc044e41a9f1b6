"""Rotary position embedding of queries and keys (Su et al., "RoFormer", arXiv:2104.09864).

On a GPU one launch of `rope_kernel` rotates q and k; elsewhere a torch reference does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import uses_triton
from .rope_kernel import kernel_constants, rope_kernel, rope_triton

CHUNK = 1 << 18  # elements that the reference turns at a time


def rope_tables(
    positions: int | Tensor,
    rotary_dim: int,
    theta: float = 10000.0,
    *,
    frequencies: Tensor | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `position * theta ** (-2 i / rotary_dim)`, float32, `[*positions.shape, rotary_dim / 2]`.

    `positions` is a tensor of token positions of any shape, or a length n that stands for 0 .. n - 1. `frequencies`
    [rotary_dim / 2] take the place of the powers of `theta`.
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be a positive even number, not {rotary_dim}")
    if isinstance(positions, int):
        positions = torch.arange(positions, device=device)
    # float64: at position 1e6 a float32 angle is off by 0.06 radian
    if frequencies is None:
        exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float64) / rotary_dim
        frequencies = theta**-exponent
    angle = positions.double()[..., None] * frequencies.to(positions.device, torch.float64)
    return angle.cos().float(), angle.sin().float()


# --- torch reference


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor) -> None:
    """Writes the rotation of x [B, S, H, D] by tables [B, S, 1, R / 2] to `out`, which may be x itself."""
    half = cos.shape[-1]
    if 2 * half < x.shape[-1] and out is not x:
        out[..., 2 * half :] = x[..., 2 * half :]
    if interleaved:
        pairs = x[..., : 2 * half].to(cos.dtype).unflatten(-1, (half, 2)).contiguous()
        turned = torch.view_as_complex(pairs) * torch.complex(cos, sin)
        out[..., : 2 * half] = torch.view_as_real(turned).flatten(-2)
        return
    a, b = x[..., :half], x[..., half : 2 * half]
    if x.dtype == cos.dtype and out is not x:
        torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=out[..., half : 2 * half]).addcmul_(a, sin)
        return
    a, b = a.to(cos.dtype), b.to(cos.dtype)
    first = (a * cos).addcmul_(b, sin, value=-1)
    out[..., half : 2 * half] = (b * cos).addcmul_(a, sin)
    out[..., :half] = first


def _reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, q_out: Tensor, k_out: Tensor) -> None:
    dtype = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.to(dtype)[:, :, None], sin.to(dtype)[:, :, None]
    for x, out in ((q, q_out), (k, k_out)):
        # pieces whose float32 copies stay in the processor's cache
        step = max(1, CHUNK // max(1, x.shape[0] * x.shape[2] * x.shape[3]))
        for i in range(0, x.shape[1] if x.numel() else 0, step):
            part = slice(i, i + step)
            piece = x[:, part]
            target = piece if out is x else out[:, part]
            _rotate_reference(piece, cos[:, part], sin[:, part], interleaved, target)


# --- operators and their gradient


@torch.library.custom_op("ds_llm::rope", mutates_args=())
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if uses_triton(q):
        rope_triton(q, k, cos, sin, interleaved, inverse, q_out, k_out)
    else:
        _reference(q, k, cos, -sin if inverse else sin, interleaved, q_out, k_out)
    return q_out, k_out


@_rope.register_fake
def _(q, k, cos, sin, interleaved, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("ds_llm::rope_", mutates_args=("q", "k"))
def _rope_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    if uses_triton(q):
        rope_triton(q, k, cos, sin, interleaved, False, q, k)
    else:
        _reference(q, k, cos, sin, interleaved, q, k)


def _save(ctx, inputs, output):
    _, _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, q_grad, k_grad):
    cos, sin = ctx.saved_tensors
    return *_rope(q_grad, k_grad, cos, sin, ctx.interleaved, not ctx.inverse), None, None, None, None


_rope.register_autograd(_backward, setup_context=_save)


# --- public functions


def _half_tables(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, rotary_dim: int | None
) -> tuple[Tensor, Tensor]:
    """The tables as [B, S, rotary_dim / 2] views, one entry per rotated pair."""
    batch, length, _, head_dim = q.shape
    if k.shape[:2] != q.shape[:2] or k.shape[3] != head_dim:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch, length and head dimension")
    if cos.shape != sin.shape:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must have one shape")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin are constants of apply_rope: detach them")
    width = cos.shape[-1]
    if rotary_dim is None:
        rotary_dim = 2 * width if 2 * width <= head_dim else width
    if rotary_dim % 2 or rotary_dim > head_dim or width not in (rotary_dim, rotary_dim // 2):
        raise ValueError(f"tables of width {width} do not fit rotary_dim {rotary_dim} of head dimension {head_dim}")

    def pairs(table: Tensor) -> Tensor:
        if width == rotary_dim:
            table = table[..., ::2] if interleaved else table[..., : rotary_dim // 2]
        if table.ndim == 2 and len(table) == batch * length != length:
            return table.unflatten(0, (batch, length))
        if table.ndim in (2, 3) and table.shape[-2] == length and table.shape[:-2] in ((), (1,), (batch,)):
            return table.expand(batch, length, rotary_dim // 2)
        raise ValueError(
            f"tables of shape {tuple(cos.shape)} fit neither [S, R], [B, S, R] nor [B * S, R] for q {tuple(q.shape)}"
        )

    return pairs(cos), pairs(sin)


def apply_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, rotary_dim: int | None = None
) -> tuple[Tensor, Tensor]:
    """Rotates the first `rotary_dim` elements of every head; the rest passes through.

    q is [B, S, Hq, D] and k [B, S, Hk, D], of any strides; the results are contiguous, of the same shape and dtype,
    computed in float32. Pairs are (i, i + rotary_dim / 2), or (2 i, 2 i + 1) when `interleaved`. cos and sin are
    [S, R], [B, S, R] or [B * S, R] (a row per token, as packed sequences need), where R is rotary_dim / 2, or
    rotary_dim with both entries of a pair equal. A width R with 2 R <= D is taken for rotary_dim / 2 unless
    `rotary_dim` says otherwise.

    Differentiable in q and k; the gradient is the inverse rotation, so only cos and sin are kept for it. q and k are
    never overwritten: see `apply_rope_`.
    """
    cos, sin = _half_tables(q, k, cos, sin, interleaved, rotary_dim)
    return _rope(q, k, cos, sin, interleaved, False)


def apply_rope_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, rotary_dim: int | None = None
) -> tuple[Tensor, Tensor]:
    """`apply_rope` that overwrites q and k and returns them; for tensors of which no gradient is wanted.

    Autograd has no in-place function with two outputs that are views, as q and k mostly are, hence the restriction.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise ValueError("apply_rope_ overwrites q and k and has no gradient: use apply_rope, or torch.no_grad()")
    cos, sin = _half_tables(q, k, cos, sin, interleaved, rotary_dim)
    _rope_in_place(q, k, cos, sin, interleaved)
    return q, k


def compile_specs() -> list:
    """Configurations to compile ahead of time: dtypes, layouts and head shapes of the models in use."""
    from .compile_check import CompileSpec

    strides = [f"{t}_{d}" for t in ("q", "k", "qo", "ko") for d in "bsh"] + ["cos_b", "cos_s", "sin_b", "sin_s"]
    sizes = ["tokens", "length"]
    ones = dict.fromkeys([f"{t}_d" for t in ("q", "k", "qo", "ko", "cos", "sin")], 1)
    specs = []
    for name, q_heads, k_heads, head_dim, half in (
        ("llama-8b", 32, 8, 128, 64),
        ("qwen-28-heads", 28, 4, 128, 64),
        ("small", 8, 2, 64, 32),
        ("partial", 32, 8, 96, 24),
        ("wide", 16, 16, 256, 128),
    ):
        for dtype, index in (("bf16", "i32"), ("fp16", "i32"), ("fp32", "i64")):
            for interleaved in (False, True):
                for inverse in (False, True):
                    constants, warps = kernel_constants(q_heads, k_heads, head_dim, half, interleaved, copy=True)
                    signature = dict.fromkeys(["q", "k", "q_out", "k_out"], f"*{dtype}")
                    signature |= dict.fromkeys(["cos", "sin"], "*fp32") | dict.fromkeys(sizes, "i32")
                    signature |= dict.fromkeys(strides, index)
                    label = f"rope {name} {dtype}{' interleaved' * interleaved}{' inverse' * inverse}"
                    specs.append(
                        CompileSpec(
                            name=label,
                            fn=rope_kernel,
                            signature=signature,
                            constexprs={**ones, "INVERSE": inverse, **constants},
                            num_warps=warps,
                            num_stages=3,
                        )
                    )
    return specs
