"""Rotary embedding against its definition in float64, on the torch path and on the Triton kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_llm.kernels import rope
from ds_llm.kernels.rope import apply_rope, apply_rope_, rope_tables

pytestmark = pytest.mark.usefixtures("path", "poisoned")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def rotate64(x, cos, sin, interleaved):
    """x [B, S, H, D], cos and sin [B, S, R / 2]: each pair turned by its angle."""
    half = cos.shape[-1]
    x = x.double()
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    (a, b), c, s = pairs.unbind(-1), cos.double()[:, :, None], sin.double()[:, :, None]
    pairs = torch.stack([a * c - b * s, a * s + b * c], -1)
    out = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat([out, rest], -1)


@settings(max_examples=25)
@given(data=st.data())
def test_rotation_and_gradient_are_their_definitions(device, data):
    draw = data.draw
    batch, length = draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 2, 5, 9]))
    k_heads = draw(st.integers(1, 3))
    q_heads = k_heads * draw(st.integers(1, 5))
    head_dim = draw(st.sampled_from([2, 6, 10, 16, 24]))
    rotary_dim = draw(st.sampled_from([d for d in (2, 6, 8, 16, 24) if d <= head_dim]))
    interleaved = draw(st.booleans())
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    torch.manual_seed(draw(st.integers(0, 1 << 30)))

    def states(heads):
        layout = draw(st.sampled_from(["contiguous", "heads first", "sliced"]))
        if layout == "heads first":
            x = torch.randn(batch, heads, length, head_dim).to(dtype).transpose(1, 2)
        elif layout == "sliced":
            x = torch.randn(batch, length, heads, 2 * head_dim).to(dtype)[..., ::2]
        else:
            x = torch.randn(batch, length, heads, head_dim).to(dtype)
        return x.to(device)

    kind = draw(st.sampled_from(["shared", "batch", "tokens"]))
    angle = torch.randn(*{"shared": (length,), "batch": (batch, length), "tokens": (batch * length,)}[kind], 1)
    angle = (10 * angle * torch.rand(rotary_dim // 2)).to(device)
    cos, sin = angle.cos(), angle.sin()
    per_token = (cos.expand(batch, *cos.shape) if kind == "shared" else cos).reshape(batch, length, rotary_dim // 2)
    per_token_sin = (sin.expand(batch, *sin.shape) if kind == "shared" else sin).reshape(batch, length, rotary_dim // 2)
    if draw(st.booleans()):  # tables with both entries of a pair
        cos, sin = (t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1) for t in (cos, sin))

    q, k = states(q_heads), states(k_heads)
    q0, k0 = q.clone(), k.clone()
    leaves = q.requires_grad_(), k.requires_grad_()
    results = apply_rope(q, k, cos, sin, interleaved=interleaved, rotary_dim=rotary_dim)
    for x, out in zip(leaves, results, strict=True):
        want = rotate64(x.detach(), per_token, per_token_sin, interleaved)
        assert out.dtype == dtype and out.shape == x.shape and out.is_contiguous()
        torch.testing.assert_close(out.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        grad = torch.randn(batch, x.shape[2], length, head_dim, device=device).to(dtype).transpose(1, 2)
        out.backward(grad, retain_graph=True)
        want = rotate64(grad, per_token, -per_token_sin, interleaved)
        torch.testing.assert_close(x.grad.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(q.detach(), q0) and torch.equal(k.detach(), k0)
    with torch.no_grad():
        in_place = apply_rope_(q, k, cos, sin, interleaved=interleaved, rotary_dim=rotary_dim)
        assert in_place[0] is q and in_place[1] is k
        for changed, out in zip(in_place, results, strict=True):
            assert torch.equal(changed, out)


@pytest.mark.parametrize("heads", [(32, 8, 128), (28, 4, 64), (40, 40, 80)])
def test_heads_of_real_models(device, heads):
    q_heads, k_heads, head_dim = heads
    q, k = (torch.randn(1, 3, h, head_dim, device=device) for h in (q_heads, k_heads))
    cos, sin = rope_tables(torch.randint(1 << 17, (1, 3), device=device), head_dim)
    for x, out in zip((q, k), apply_rope(q, k, cos, sin), strict=True):
        torch.testing.assert_close(out.double(), rotate64(x, cos, sin, False), rtol=1e-5, atol=1e-5)


def test_tables_are_exact_at_far_positions():
    positions = torch.randint(1 << 20, (7,))
    cos, sin = rope_tables(positions, 16, 5e5)
    frequency = torch.tensor([5e5 ** (-2 * i / 16) for i in range(8)], dtype=torch.float64)
    angle = positions.double()[:, None] * frequency
    torch.testing.assert_close(cos.double(), angle.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin.double(), angle.sin(), rtol=0, atol=1e-6)
    assert torch.equal(rope_tables(9, 16)[0], rope_tables(torch.arange(9), 16)[0])


def test_float64_passes_gradcheck(device):
    q, k = (torch.randn(2, 3, h, 6, dtype=torch.float64, device=device, requires_grad=True) for h in (4, 2))
    cos, sin = rope_tables(3, 4, device=device)
    assert torch.autograd.gradcheck(lambda q, k: apply_rope(q, k, cos, sin, interleaved=True), (q, k))


def test_offsets_past_int32_do_not_overflow(device, monkeypatch):
    """Views whose last token lies 2^31 elements behind the first; only the touched pages take memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    base = torch.empty((1 << 31) + 64, dtype=torch.bfloat16, device=device)
    q = base.as_strided((1, 3, 2, 8), (0, 1 << 30, 8, 1))
    q.copy_(torch.randn(1, 3, 2, 8))
    k = torch.randn(1, 3, 1, 8, device=device).bfloat16()
    cos, sin = rope_tables(3, 8, device=device)
    want = apply_rope(q.clone(), k, cos, sin)
    assert all(torch.equal(a, b) for a, b in zip(apply_rope(q, k, cos, sin), want, strict=True))
    apply_rope_(q, k, cos, sin)
    assert torch.equal(q, want[0])


def test_operators_are_registered_completely(device):
    q, k = (torch.randn(2, 3, h, 6, device=device, requires_grad=True) for h in (4, 2))
    cos, sin = (t.expand(2, 3, 3) for t in rope_tables(3, 6, device=device))
    torch.library.opcheck(rope._rope, (q, k, cos, sin, False, False))
    torch.library.opcheck(rope._rope_in_place, (q.detach(), k.detach(), cos, sin, True))


def test_compiles_as_one_graph(device):
    def attend(q, k, cos, sin):
        q, k = apply_rope(q, k, cos, sin)
        return torch.einsum("bshd,bthd->bhst", q, k)

    leaves = [torch.randn(2, 4, 3, 8, device=device, requires_grad=True) for _ in range(2)]
    tables = rope_tables(4, 8, device=device)
    results = []
    for run in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        out = run(*leaves, *tables)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_wrong_arguments_are_named():
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8)
    cos, sin = rope_tables(3, 8)
    with pytest.raises(ValueError, match="must agree"):
        apply_rope(q, k[:, :2], cos, sin)
    with pytest.raises(ValueError, match="fit neither"):
        apply_rope(q, k, cos[:2], sin[:2])
    with pytest.raises(ValueError, match="do not fit rotary_dim"):
        apply_rope(q, k, cos, sin, rotary_dim=6)
    with pytest.raises(ValueError, match="one shape"):
        apply_rope(q, k, cos, sin[:, :2])
    with pytest.raises(ValueError, match="has no gradient"):
        apply_rope_(q.requires_grad_(), k, cos, sin)
    with pytest.raises(ValueError, match="positive even"):
        rope_tables(4, 3)
