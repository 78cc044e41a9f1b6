"""Rotary position embedding of queries and keys (Su et al., "RoFormer", arXiv:2104.09864)."""

import torch
from torch import Tensor


def rope_tables(
    positions: int | Tensor, rotary_dim: int, theta: float = 10000.0, *, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `position * theta ** (-2 i / rotary_dim)`, float32, `[*positions.shape, rotary_dim / 2]`.

    `positions` is a tensor of token positions of any shape, or a length n that stands for 0 .. n - 1.
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be a positive even number, not {rotary_dim}")
    if isinstance(positions, int):
        positions = torch.arange(positions, device=device)
    # float64: at position 1e6 a float32 angle is off by 0.06 radian
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float64) / rotary_dim
    angle = positions.double()[..., None] * theta**-exponent
    return angle.cos().float(), angle.sin().float()


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotates the first `rotary_dim` elements of every head of q [B, S, Hq, D] and k [B, S, Hk, D]."""
    rows = cos.shape[-1]
    half = rows if 2 * rows <= q.shape[-1] else rows // 2
    step = 2 if interleaved and half != rows else 1

    def table(t: Tensor) -> Tensor:
        t = t[..., ::step][..., :half].float()
        return t.reshape(-1 if t.numel() // half == q.shape[0] * q.shape[1] else 1, q.shape[1], 1, half)

    c, s = table(cos), table(sin)

    def rotate(x: Tensor) -> Tensor:
        turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
        if interleaved:
            a, b = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
        else:
            a, b = turned[..., :half], turned[..., half:]
            turned = torch.cat((a * c - b * s, b * c + a * s), -1)
        return torch.cat((turned.to(x.dtype), rest), -1)

    return rotate(q), rotate(k)
