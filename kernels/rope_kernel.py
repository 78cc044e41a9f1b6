"""Triton kernel of the rotary position embedding.

One launch rotates q and k: a program takes whole tokens, loads their cosines and sines once and walks over the heads,
so that every element of q and k is read once and written once: 2 (Hq + Hk) D elements per token.
"""

from __future__ import annotations

from torch import Tensor

from ._triton import jit, launch_on, next_power_of_2, tl

# elements of one half of the rotated part per program: 16 for each of 128 threads, two 16-byte loads of bfloat16
TILE = 2048


@jit
def _rotate_heads(
    x,
    out,
    x_heads,
    out_heads,
    x_dim,
    out_dim,
    cos,
    sin,
    token_mask,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """x and out: [tokens, 1, 1] pointers to the first element of each token; cos and sin: [tokens, 1, half] tiles."""
    for start in range(0, HEADS, BLOCK_HEADS):
        head = (start + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[None, :, None]
        mask = token_mask & (head < HEADS)
        src, dst = x + head * x_heads, out + head * out_heads
        if INTERLEAVED:
            column = tl.arange(0, 2 * BLOCK_HALF).to(tl.int64)[None, None, :]
            inside = mask & (column < 2 * HALF)
            pairs = tl.load(src + column * x_dim, mask=inside, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(pairs, pairs.shape[0], BLOCK_HEADS, BLOCK_HALF, 2))
            turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), pairs.shape)
            tl.store(dst + column * out_dim, turned.to(out.dtype.element_ty), mask=inside)
        else:
            column = tl.arange(0, BLOCK_HALF).to(tl.int64)[None, None, :]
            inside = mask & (column < HALF)
            a = tl.load(src + column * x_dim, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(src + (HALF + column) * x_dim, mask=inside, other=0.0).to(tl.float32)
            tl.store(dst + column * out_dim, (a * cos - b * sin).to(out.dtype.element_ty), mask=inside)
            tl.store(dst + (HALF + column) * out_dim, (b * cos + a * sin).to(out.dtype.element_ty), mask=inside)
        if COPY:
            column = 2 * HALF + tl.arange(0, BLOCK_REST).to(tl.int64)[None, None, :]
            inside = mask & (column < HEAD_DIM)
            tl.store(dst + column * out_dim, tl.load(src + column * x_dim, mask=inside), mask=inside)


@jit
def rope_kernel(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    tokens,
    length,
    q_b,
    q_s,
    q_h,
    q_d,
    k_b,
    k_s,
    k_h,
    k_d,
    qo_b,
    qo_s,
    qo_h,
    qo_d,
    ko_b,
    ko_s,
    ko_h,
    ko_d,
    cos_b,
    cos_s,
    cos_d,
    sin_b,
    sin_s,
    sin_d,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None, None]
    inside = token < tokens
    b, s = token // length, token % length
    column = tl.arange(0, BLOCK_HALF).to(tl.int64)[None, None, :]
    mask = inside & (column < HALF)
    c = tl.load(cos + b * cos_b + s * cos_s + column * cos_d, mask=mask, other=0.0).to(tl.float32)
    n = tl.load(sin + b * sin_b + s * sin_s + column * sin_d, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        n = -n
    _rotate_heads(
        q + b * q_b + s * q_s,
        q_out + b * qo_b + s * qo_s,
        q_h,
        qo_h,
        q_d,
        qo_d,
        c,
        n,
        inside,
        Q_HEADS,
        HEAD_DIM,
        HALF,
        INTERLEAVED,
        COPY,
        BLOCK_Q,
        BLOCK_HALF,
        BLOCK_REST,
    )
    _rotate_heads(
        k + b * k_b + s * k_s,
        k_out + b * ko_b + s * ko_s,
        k_h,
        ko_h,
        k_d,
        ko_d,
        c,
        n,
        inside,
        K_HEADS,
        HEAD_DIM,
        HALF,
        INTERLEAVED,
        COPY,
        BLOCK_K,
        BLOCK_HALF,
        BLOCK_REST,
    )


def _head_block(heads: int, columns: int) -> int:
    """Heads per step: as many as fit the tile, fewer where the last step would be mostly empty (e.g. 40 heads)."""
    block = min(next_power_of_2(heads), max(1, TILE // columns))
    while block > 1 and -(-heads // block) * block > 1.25 * heads:
        block //= 2
    return block


def kernel_constants(
    q_heads: int, k_heads: int, head_dim: int, half: int, interleaved: bool, copy: bool
) -> tuple[dict, int]:
    """Constants of the kernel and its number of warps."""
    block_half = next_power_of_2(half)
    block_q, block_k = _head_block(q_heads, block_half), _head_block(k_heads, block_half)
    block_tokens = min(16, max(1, TILE // (max(block_q, block_k) * block_half)))
    constants = {
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "HEAD_DIM": head_dim,
        "HALF": half,
        "INTERLEAVED": interleaved,
        "COPY": copy and 2 * half < head_dim,
        "BLOCK_TOKENS": block_tokens,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "BLOCK_HALF": block_half,
        "BLOCK_REST": next_power_of_2(head_dim - 2 * half),
    }
    return constants, 4 if block_tokens * max(block_q, block_k) * block_half >= 1024 else 2


def rope_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, q_out: Tensor, k_out: Tensor
) -> None:
    """Writes the rotation of q and k to q_out and k_out (which may be q and k); tables are [B, S, rotary_dim / 2]."""
    batch, length, q_heads, head_dim = q.shape
    tokens = batch * length
    if tokens == 0:
        return
    in_place = q_out.data_ptr() == q.data_ptr()
    constants, warps = kernel_constants(q_heads, k.shape[2], head_dim, cos.shape[-1], interleaved, not in_place)
    with launch_on(q):
        rope_kernel[(-(-tokens // constants["BLOCK_TOKENS"]),)](
            q,
            k,
            cos,
            sin,
            q_out,
            k_out,
            tokens,
            length,
            *q.stride(),
            *k.stride(),
            *q_out.stride(),
            *k_out.stride(),
            *cos.stride(),
            *sin.stride(),
            INVERSE=inverse,
            **constants,
            num_warps=warps,
        )
