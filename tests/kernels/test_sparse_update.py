"""Packed masks, expand and compact, and the AdamW steps over kept weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_llm.kernels.masked_adamw import (
    _adamw_dense_kernel,
    _masked_adamw,
    _masked_adamw_dense,
    adamw_dense_triton,
    adamw_reference,
    adamw_triton,
)
from ds_llm.kernels.packed_mask import BYTES, packed_positions
from ds_llm.kernels.sparse_update import (
    PackedMask,
    _compact_kernel,
    _expand_kernel,
    compact,
    compact_reference,
    compact_triton,
    expand,
    expand_reference,
    expand_triton,
    masked_adamw_,
    masked_adamw_dense_,
    sparse_compact,
    sparse_expand,
)

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
options = settings(max_examples=25)
# past 8 * BYTES columns a row takes several steps
shapes = st.tuples(
    st.sampled_from([0, 1, 2, 5]), st.sampled_from([0, 1, 7, 8, 9, 33, 130, 8 * BYTES, 8 * BYTES + 1, 2500])
)
densities = st.sampled_from([0.0, 0.1, 0.5, 1.0])
seeds = st.integers(0, 2**31)


def random_mask(shape, density: float, seed: int, device) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density).to(device)


# --- masks


@options
@given(shape=shapes, density=densities, seed=seeds)
def test_packing_keeps_every_bit(device, shape, density, seed):
    chosen = random_mask(shape, density, seed, device)
    mask = PackedMask.from_dense(chosen)
    assert mask.bits.dtype == torch.uint8 and mask.bits.shape == (shape[0], -(-shape[1] // 8))
    assert torch.equal(mask.to_dense(), chosen)
    assert mask.nnz == chosen.sum() == mask.offsets[-1]
    assert torch.equal(mask.offsets.diff(), chosen.sum(1))
    positions = packed_positions(mask.bits, mask.nnz, shape[1])
    assert torch.equal(positions.long(), chosen.flatten().nonzero().squeeze(1))


def test_masks_of_experts_and_of_views(device, path):
    chosen = random_mask((7, 4, 6), 0.5, 3, device).transpose(0, 2)  # [6, 4, 7], not contiguous
    mask = PackedMask.from_dense(chosen)
    assert mask.shape == (6, 4, 7) and torch.equal(mask.to_dense(), chosen)
    values = torch.randn(mask.nnz, device=device)
    dense = expand(values, mask)
    assert dense.shape == chosen.shape and torch.equal(dense[chosen], values)
    assert torch.equal(compact(dense, mask), values)


def test_masks_travel_with_their_layer(device):
    chosen = random_mask((5, 20), 0.4, 1, device)
    mask, other = PackedMask.from_dense(chosen), PackedMask.from_dense(~chosen)
    assert other.positions() is None or len(other.positions()) == other.nnz
    other.load_state_dict(mask.state_dict())
    restored = PackedMask.from_state(mask.state())
    values = torch.randn(mask.nnz, device=device)
    for same in (other, restored):
        assert same.nnz == mask.nnz
        assert torch.equal(expand(values, same), expand(values, mask))
    assert not list(mask.parameters()) and set(mask.state_dict()) == {"bits", "offsets"}
    assert expand(values.cpu(), mask.to("cpu")).device.type == "cpu"


@pytest.mark.parametrize("wrong", [torch.ones(3, 4), torch.ones(4, dtype=torch.bool)])
def test_masks_refuse_other_input(wrong):
    with pytest.raises(ValueError, match="bool mask"):
        PackedMask.from_dense(wrong)


def test_buffers_must_fit_the_shape():
    mask = PackedMask.from_dense(torch.ones(3, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="do not fit"):
        PackedMask(mask.bits, mask.offsets, (3, 17))


# --- expand and compact


@options
@given(shape=shapes, density=densities, seed=seeds, dtype=st.sampled_from(DTYPES))
@pytest.mark.parametrize("triton", [False, True])
def test_expand_and_compact_equal_indexing(device, triton, shape, density, seed, dtype):
    chosen = random_mask(shape, density, seed, device)
    mask = PackedMask.from_dense(chosen)
    positions = packed_positions(mask.bits, mask.nnz, shape[1])
    values = torch.randn(mask.nnz, device=device).to(dtype)
    if triton:
        dense = expand_triton(values, mask.bits, mask.offsets, shape[1])
    else:
        dense = expand_reference(values, positions, *shape)
    expected = torch.zeros(shape, dtype=dtype, device=device)
    expected[chosen] = values
    assert dense.dtype == dtype and torch.equal(dense, expected)

    # rows and columns apart from each other, and NaN where nothing is kept
    source = torch.full((2 * shape[1] + 1, shape[0] + 3), torch.nan, dtype=dtype, device=device)
    source = source[: 2 * shape[1] : 2, : shape[0]].t()
    source[chosen] = values
    assert source.shape == shape
    if triton:
        found = compact_triton(source, mask.bits, mask.offsets, mask.nnz)
    else:
        found = compact_reference(source, positions)
    assert torch.equal(found, values)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_each_is_the_other_gradient(device, path, dtype):
    chosen = random_mask((6, 45), 0.3, 5, device)
    mask = PackedMask.from_dense(chosen)
    values = torch.randn(mask.nnz, device=device).to(dtype).requires_grad_()
    upstream = torch.randn(6, 45, device=device).to(dtype)
    (gradient,) = torch.autograd.grad(expand(values, mask), values, upstream)
    assert torch.equal(gradient, upstream[chosen])
    dense = torch.randn(45, 6, device=device).to(dtype).t().requires_grad_()
    (gradient,) = torch.autograd.grad(compact(dense, mask), dense, values.detach())
    assert torch.equal(gradient, expand(values.detach(), mask))


def test_gradcheck(device):
    mask = PackedMask.from_dense(random_mask((3, 11), 0.5, 7, device))
    values = torch.randn(mask.nnz, dtype=torch.float64, device=device, requires_grad=True)
    dense = torch.randn(3, 11, dtype=torch.float64, device=device, requires_grad=True)
    for function, x in ((expand, values), (compact, dense)):
        assert torch.autograd.gradcheck(lambda t, f=function: f(t, mask), x)
        assert torch.autograd.gradgradcheck(lambda t, f=function: f(t, mask).square(), x)


def test_wrong_sizes_are_refused():
    mask = PackedMask.from_dense(torch.eye(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="keeps 4 weights"):
        expand(torch.zeros(5), mask)
    with pytest.raises(ValueError, match="expected"):
        compact(torch.zeros(4, 5), mask)


# --- AdamW


def float64_adamw(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
    """The update of arXiv:1711.05101, written out."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p = p - lr * weight_decay * p
    p = p - lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    return p, m, v


def states(shape, dtype, state_dtype, device, seed) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    p, grad, m = (torch.randn(shape, generator=g) for _ in range(3))
    tensors = p.to(dtype), grad.to(dtype), 0.1 * m.to(state_dtype), torch.rand(shape, generator=g).to(state_dtype)
    return [t.to(device) for t in tensors]


RATES = ("step", "lr", "beta1", "beta2", "eps", "weight_decay")
choices = st.fixed_dictionaries(
    {
        "step": st.sampled_from([1, 2, 1000]),
        "lr": st.sampled_from([1e-3, 0.1]),
        "beta1": st.sampled_from([0.9, 0.0]),
        "beta2": st.sampled_from([0.95, 0.999]),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
    }
)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=max(1e-5, eps), atol=max(1e-6, eps / 16))


@options
@given(
    n=st.sampled_from([0, 1, 1023, 1024, 1500]),
    dtype=st.sampled_from(DTYPES),
    state_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    with_master=st.booleans(),
    choice=choices,
    seed=seeds,
)
@pytest.mark.parametrize("compute", [adamw_reference, adamw_triton])
def test_values_equal_float64(device, compute, n, dtype, state_dtype, with_master, choice, seed):
    p, g, m, v = states(n, dtype, state_dtype, device, seed)
    master = p.float() + 1e-4 if with_master else None
    source = p if master is None else master
    expected = float64_adamw(source.double(), g.double(), m.double(), v.double(), **choice)
    before = g.clone()
    compute(p, g, m, v, master, *(choice[name] for name in RATES))
    for found, exact in zip((p, m, v), expected, strict=True):
        close(found, exact)
    assert torch.equal(g, before)
    if master is not None:
        close(master, expected[0])
        if compute is adamw_reference or device.type == "cuda":  # the interpreter cuts bf16 off where a GPU rounds
            assert torch.equal(master.to(dtype), p)


@options
@given(shape=shapes, density=densities, dtype=st.sampled_from(DTYPES), choice=choices, seed=seeds)
@pytest.mark.parametrize("triton", [False, True])
def test_dense_form_equals_float64_and_leaves_pruned_weights_alone(device, triton, shape, density, dtype, choice, seed):
    chosen = random_mask(shape, density, seed, device)
    mask = PackedMask.from_dense(chosen)
    tensors = states(shape, dtype, torch.float32, device, seed)
    for t in tensors:  # whatever is in the states of pruned weights stays
        t.masked_fill_(~chosen & random_mask(shape, 0.5, seed + 1, device), torch.nan)
    before = [t.clone() for t in tensors]
    expected = float64_adamw(*(t.double() for t in before), **choice)
    if triton:
        adamw_dense_triton(*tensors, mask.bits, shape[1], *(choice[name] for name in RATES))
    else:
        masked_adamw_dense_(*tensors, mask=mask, **choice)
    p, g, m, v = tensors
    for found, exact, old in zip((p, m, v), expected, (before[0], *before[2:]), strict=True):
        close(found[chosen], exact[chosen])
        assert torch.equal(bitwise(found)[~chosen], bitwise(old)[~chosen])
    assert torch.equal(bitwise(g), bitwise(before[1]))


def bitwise(t: torch.Tensor) -> torch.Tensor:
    """`t` as integers: NaN equals NaN."""
    return t.view({2: torch.int16, 4: torch.int32}[t.itemsize])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_many_steps_follow_torch_adamw(device, path, weight_decay):
    """Steps on the kept values, in both forms, beside torch.optim.AdamW on the values alone."""
    chosen = random_mask((9, 70), 0.3, 11, device)
    mask = PackedMask.from_dense(chosen)
    dense = torch.randn(9, 70, device=device) * chosen
    values = compact(dense, mask)
    exact = torch.nn.Parameter(values.double())
    optimizer = torch.optim.AdamW([exact], lr=0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=weight_decay)
    kept_states = [torch.zeros_like(values) for _ in range(2)]
    dense_states = [torch.zeros_like(dense) for _ in range(2)]
    rates = {"lr": 0.01, "beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": weight_decay}
    for step in range(1, 8):
        grad = torch.randn(9, 70, device=device)
        exact.grad = grad[chosen].double()
        optimizer.step()
        masked_adamw_(values, compact(grad, mask), *kept_states, step=step, **rates)
        masked_adamw_dense_(dense, grad, *dense_states, mask=mask, step=step, **rates)
    torch.testing.assert_close(values.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dense[chosen].double(), exact.detach(), rtol=1e-5, atol=1e-6)
    assert not dense[~chosen].any() and not any(s[~chosen].any() for s in dense_states)


def test_a_master_copy_keeps_small_updates(device):
    """bf16 values of 1 do not move by 1e-4 a step; their float32 master copy does, and they follow it."""
    values = torch.ones(8, dtype=torch.bfloat16, device=device)
    alone, master = values.clone(), values.float()
    both = [[torch.zeros(8, device=device) for _ in range(2)] for _ in range(2)]
    for step in range(1, 101):
        masked_adamw_(values, torch.ones_like(values), *both[0], step=step, lr=1e-4, weight_decay=0.0, master=master)
        masked_adamw_(alone, torch.ones_like(values), *both[1], step=step, lr=1e-4, weight_decay=0.0)
    assert (alone == 1).all()
    torch.testing.assert_close(master, torch.full_like(master, 0.99))
    assert torch.equal(values, master.bfloat16())


def test_states_that_do_not_fit_are_refused(device):
    p, g, m, v = states((4, 6), torch.float32, torch.float32, device, 0)
    with pytest.raises(ValueError, match="exp_avg_sq"):
        masked_adamw_(p, g, m, v[:2], step=1, lr=0.1)
    with pytest.raises(ValueError, match="contiguous"):
        masked_adamw_(p.t(), g.t(), m.t(), v.t(), step=1, lr=0.1)
    with pytest.raises(ValueError, match="the mask is"):
        masked_adamw_dense_(p, g, m, v, mask=PackedMask.from_dense(torch.ones(4, 5).bool()), step=1, lr=0.1)
    with pytest.raises(ValueError, match="step"):
        masked_adamw_(p, g, m, v, step=0, lr=0.1)


# --- registration and index arithmetic


def operator_calls(device) -> list:
    mask = PackedMask.from_dense(random_mask((5, 20), 0.4, 2, device))
    values = torch.randn(mask.nnz, device=device, requires_grad=True)
    dense = torch.randn(5, 20, device=device, requires_grad=True)
    buffers = mask.bits, mask.offsets
    rates = (3, 1e-3, 0.9, 0.99, 1e-8, 0.1)
    kept, full = (states(s, torch.bfloat16, torch.float32, device, 1) for s in (mask.nnz, (5, 20)))
    return [
        (sparse_expand, (values, *buffers, mask.positions(), 20)),
        (sparse_expand, (values, *buffers, None, 20)),
        (sparse_compact, (dense, *buffers, mask.positions(), mask.nnz)),
        (packed_positions, (mask.bits, mask.nnz, 20)),
        (_masked_adamw, (*kept, kept[0].float(), *rates)),
        (_masked_adamw, (*kept, None, *rates)),
        (_masked_adamw_dense, (*full, mask.bits, mask.positions(), mask.nnz, *rates)),
    ]


@pytest.mark.parametrize("index", range(7))
def test_opcheck(device, index):
    operator, arguments = operator_calls(device)[index]
    torch.library.opcheck(operator, arguments)


def test_compiles_without_graph_breaks(device):
    mask = PackedMask.from_dense(random_mask((5, 20), 0.4, 2, device))
    values = torch.randn(mask.nnz, device=device, requires_grad=True)
    x = torch.randn(3, 20, device=device)

    def layer(values, x):
        return (x @ expand(values, mask).t()).square().sum() + compact(expand(values, mask) * 2, mask).sum()

    def step(values, grad, m, v):
        masked_adamw_(values, grad, m, v, step=2, lr=0.1)
        return values.sum()

    loss = torch.compile(layer, fullgraph=True, backend="aot_eager")(values, x)
    torch.testing.assert_close(loss, layer(values, x))
    (grad,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(grad, torch.autograd.grad(layer(values, x), values)[0])
    plain = [values.detach().clone(), grad, torch.zeros_like(grad), torch.zeros_like(grad)]
    compiled = [t.clone() for t in plain]
    step(*plain)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_past_two_to_the_31_elements(device):
    """Rows of 2^30 columns, 8 of them visited: the third starts at 2^31. Untouched memory costs nothing on a CPU."""
    columns = 2**30
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        buffer = torch.empty(2 * columns + 32, dtype=torch.bfloat16, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    visited = buffer.as_strided((3, 32), (columns, 1))
    visited.fill_(7.0)
    mask = PackedMask.from_dense(random_mask((3, 8), 0.5, 4, device))
    chosen, values = mask.to_dense(), torch.randn(mask.nnz, device=device).bfloat16()
    _expand_kernel[(3,)](values, mask.bits, mask.offsets, buffer, columns, 1, BYTES=1)
    assert torch.equal(visited[:, :8], expand(values, mask))
    found = torch.zeros_like(values)
    _compact_kernel[(3,)](buffer, mask.bits, mask.offsets, found, columns, 1, columns, 1, BYTES=1)
    assert torch.equal(found, values)

    # parameter, gradient and states lie 8 elements apart in the same rows
    near = states((3, 8), torch.bfloat16, torch.bfloat16, device, 5)
    for i, t in enumerate(near):
        visited[:, 8 * i : 8 * i + 8] = t
    rates = (0.1, 0.001, 0.1, 0.01, 0.5, 1e-8)
    far = [buffer[8 * i :] for i in range(4)]
    _adamw_dense_kernel[(3, 1)](*far, mask.bits, columns, 1, *rates, BYTES=1)
    _adamw_dense_kernel[(3, 1)](*near, mask.bits, 8, 1, *rates, BYTES=1)
    for i, t in enumerate(near):
        assert torch.equal(visited[:, 8 * i : 8 * i + 8], t)
    assert chosen.any() and not torch.equal(near[0], near[1])
