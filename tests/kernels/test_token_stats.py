"""Token statistics and the linear cross-entropy against float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ds_llm.kernels.cross_entropy_rows import _cross_entropy_kernel, cross_entropy_rows, rows_triton
from ds_llm.kernels.linear_cross_entropy import _per_token, _per_token_backward, _summed
from ds_llm.kernels.token_stats import (
    IGNORE,
    MASKED,
    _linear_token_stats,
    _token_stats_kernel,
    linear_cross_entropy,
    linear_token_stats,
    token_stats_reference,
    token_stats_triton,
)

# the interpreter is NumPy, which warns of 0 * inf in lanes that a mask then drops
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# the path is the same for all examples of a test
options = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
small = st.fixed_dictionaries(
    {
        "tokens": st.sampled_from([0, 1, 2, 5, 9]),
        "hidden": st.integers(1, 17),
        "vocabulary": st.sampled_from([1, 2, 63, 64, 65, 130, 300]),
        "dtype": st.sampled_from(DTYPES),
        "bias": st.booleans(),
        "softcap": st.sampled_from([None, 5.0]),
        "seed": st.integers(0, 2**31),
    }
)


@pytest.fixture(scope="module", autouse=True)
def several_steps():
    """Steps of 64 logits, so that vocabularies of hundreds take several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ds_llm.kernels.cross_entropy_rows.VOCAB_BLOCK", 64)
        patch.setattr("ds_llm.kernels.token_stats.TILE_VOCAB", 64)
        yield


def inputs(case: dict, device: torch.device) -> tuple:
    """Products of small integers: exact in every dtype, so that only the statistics round. Many logits tie."""
    T, H, V, dtype = case["tokens"], case["hidden"], case["vocabulary"], case["dtype"]
    g = torch.Generator().manual_seed(case["seed"])
    # neither is contiguous, nor are the labels
    hidden = torch.randint(-3, 4, (H, T), generator=g).to(dtype).t()
    weight = (torch.randint(-3, 4, (V, 2 * H), generator=g) / 8).to(dtype)[:, ::2]
    labels = torch.randint(V, (T, 2), generator=g)[:, 0]
    bias = (torch.randint(-8, 9, (V,), generator=g) / 4).to(dtype) if case["bias"] else None
    return tuple(None if t is None else t.to(device) for t in (hidden, weight, labels, bias))


def exact_logits(hidden, weight, bias, softcap, temperature=1.0):
    x = hidden.double() @ weight.double().t()
    if bias is not None:
        x = x + bias.double()
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x / temperature


def check_stats(found: tuple, x: torch.Tensor, labels: torch.Tensor, ignored: torch.Tensor) -> None:
    """`found` against float64 logits x [T, V]."""
    entropy, logprob, lse, hit = found
    logp = torch.log_softmax(x, -1)
    p = logp.exp()
    torch.testing.assert_close(entropy.double(), -torch.where(p > 0, p * logp, 0).sum(-1), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(lse.double(), x.logsumexp(-1), rtol=1e-5, atol=1e-5)
    if logprob is not None:
        expected = logp.gather(1, labels.clamp_min(0)[:, None]).squeeze(1).masked_fill(ignored, 0)
        torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=2e-5)
        best = x.amax(-1, keepdim=True)
        first = (x == best).int().argmax(-1)
        # float64 logits that are equal, or far apart, are so in float32 too
        sure = ((x < best - 1e-4) | (x == best)).all(-1)
        assert torch.equal(hit[sure], ((first == labels) & ~ignored)[sure])


# --- statistics


@options
@given(case=small, temperature=st.sampled_from([1.0, 0.7]), chunk=st.integers(1, 6), labelled=st.booleans())
@pytest.mark.parametrize("compute", [token_stats_reference, token_stats_triton])
def test_statistics_equal_float64(device, compute, case, temperature, chunk, labelled):
    hidden, weight, labels, bias = inputs(case, device)
    ignored = torch.arange(len(labels), device=device) % 3 == 1
    labels = labels.masked_fill(ignored, IGNORE).contiguous()
    found = compute(hidden, weight, labels if labelled else None, bias, case["softcap"], temperature, chunk)
    x = exact_logits(hidden, weight, bias, case["softcap"], temperature)
    check_stats(found if labelled else (found[0], None, found[2], None), x, labels, ignored)


@pytest.mark.parametrize("compute", [token_stats_reference, token_stats_triton])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_extreme_logits(device, compute, dtype):
    V = 150
    rows = torch.zeros(6, V)
    rows[0, 140], rows[0, 3] = 1e4, -1e4
    rows[1] = -1e4
    rows[2] = 1e4
    rows[3] = torch.where(torch.arange(V) % 7 == 6, torch.randn(V), -torch.inf)  # whole blocks masked at first
    rows[3, :70] = -torch.inf
    rows[4] = torch.finfo(dtype).min  # how transformers masks
    rows[4, 149] = 2.0
    rows[5] = -torch.inf
    rows[5, 0] = -1e4
    labels = torch.tensor([140, 0, 1, 90, 149, 0], device=device)
    # one row at a time through hidden = 1: the product is the weight itself
    for i, row in enumerate(rows):
        weight = row.to(device, dtype)[:, None]
        hidden = torch.ones(1, 1, dtype=dtype, device=device)
        found = compute(hidden, weight, labels[i : i + 1], None, None, 1.0, 128)
        check_stats(found, weight.double().t(), labels[i : i + 1], torch.zeros(1, dtype=torch.bool, device=device))


@options
@given(seed=st.integers(0, 2**31), equal=st.integers(1, 4), dtype=st.sampled_from(DTYPES))
@pytest.mark.parametrize("compute", [token_stats_reference, token_stats_triton])
def test_of_equal_largest_logits_the_first_is_the_hit(device, compute, seed, equal, dtype):
    """Several words share the largest logit, in one block of the vocabulary or in many; each is the label once."""
    V = 300
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(-8, 3, (V,), generator=g)
    labels = torch.randperm(V, generator=g)[: equal + 1]  # the last one has a smaller logit
    logits[labels[:equal]] = 3
    hidden = torch.ones(len(labels), 1, dtype=dtype, device=device)
    hit = compute(hidden, logits[:, None].to(device, dtype), labels.to(device), None, None, 1.0, V)[3]
    assert torch.equal(hit.cpu(), labels == logits.argmax())


def test_mask_through_the_bias(device, path):
    bias = torch.randn(40, device=device)
    bias[5:30] = -torch.inf
    hidden, weight = torch.randn(3, 8, device=device), torch.randn(40, 8, device=device)
    labels = torch.tensor([0, 35, 7], device=device)  # the last one is masked
    found = linear_token_stats(hidden, weight, labels, bias=bias)
    x = exact_logits(hidden, weight, bias, None)
    assert found.logprob[2] == -torch.inf
    check_stats(tuple(found), x, labels, torch.zeros(3, dtype=torch.bool, device=device))


def test_float64_stays_float64(device):
    hidden, weight = (torch.randn(n, 16, dtype=torch.float64, device=device) for n in (7, 3000))
    labels = torch.randint(3000, (7,), device=device)
    found = linear_token_stats(hidden, weight, labels)
    logp = torch.log_softmax(hidden @ weight.t(), -1)
    torch.testing.assert_close(found.entropy, -(logp.exp() * logp).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.logprob, logp.gather(1, labels[:, None]).squeeze(1), rtol=1e-12, atol=1e-12)


def test_autocast_computes_in_its_dtype(device, path):
    hidden, weight = torch.randn(4, 16, device=device), torch.randn(50, 16, device=device)
    labels = torch.randint(50, (4,), device=device)
    expected = linear_token_stats(hidden.bfloat16(), weight.bfloat16(), labels)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for a, b in zip(linear_token_stats(hidden, weight, labels), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(5, 3)}, "expected hidden"),
        ({"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}, "cast one"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "expected labels"),
        ({"bias": torch.zeros(4)}, "expected bias"),
        ({"temperature": 0.0}, "temperature"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(2).long()} | change
    with pytest.raises(ValueError, match=message):
        linear_token_stats(**arguments)
    if message not in ("temperature", "chunk"):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(**arguments)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor of each dtype that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor):
                self.numel[t.dtype] = max(self.numel.get(t.dtype, 0), t.untyped_storage().nbytes() // t.itemsize)
        return result


@pytest.mark.parametrize("compute", [token_stats_reference, token_stats_triton])
def test_extra_memory_is_one_chunk_of_logits(device, compute):
    T, V, rows = 12, 700, 4
    hidden, weight = (torch.randn(n, 8, device=device).bfloat16() for n in (T, V))
    labels = torch.randint(V, (T,), device=device)
    with Largest() as seen:
        compute(hidden, weight, labels, None, None, 1.0, rows)
    assert seen.numel[torch.bfloat16] <= max(rows * V, weight.numel())
    if compute is token_stats_triton and device.type == "cuda":
        assert seen.numel[torch.float32] <= T
    else:
        assert seen.numel[torch.float32] <= rows * 64  # a tile


# --- cross-entropy


def float64_loss(hidden, weight, labels, bias, softcap, z_loss):
    """Per-token losses and the float64 leaves they depend on."""
    leaves = [None if t is None else t.double().detach().requires_grad_() for t in (hidden, weight, bias)]
    x = exact_logits(leaves[0], leaves[1], leaves[2], softcap)
    ce = torch.nn.functional.cross_entropy(x, labels, reduction="none", ignore_index=IGNORE)
    valid = labels != IGNORE
    return ce + z_loss * x.logsumexp(-1).square() * valid, [t for t in leaves if t is not None]


@options
@given(case=small, z_loss=st.sampled_from([0.0, 0.1]), scale=st.sampled_from([None, 1.0, 64.0]), upstream=st.booleans())
@pytest.mark.parametrize("compute", [cross_entropy_rows, rows_triton])
def test_rows_equal_float64(device, compute, case, z_loss, scale, upstream):
    hidden, weight, labels, bias = inputs(case, device)
    labels, softcap = labels.contiguous(), case["softcap"]
    logits = (hidden @ weight.t()).contiguous()
    up = torch.rand(len(labels), device=device) if upstream else None
    x = logits.double().requires_grad_()
    capped = exact_logits(x, torch.eye(x.shape[1], device=device), bias, softcap)
    expected = torch.nn.functional.cross_entropy(capped, labels, reduction="none")
    expected = expected + z_loss * capped.logsumexp(-1).square()
    (gradient,) = torch.autograd.grad(expected, x, torch.ones_like(expected) if up is None else up.double())
    losses = compute(logits, labels, bias, softcap, z_loss, up, scale)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=3e-5)
    if scale is not None:
        rtol = max(1e-4, 2 * torch.finfo(case["dtype"]).eps)
        torch.testing.assert_close(logits.double(), scale * gradient, rtol=rtol, atol=1e-5 * scale)


@options
@given(case=small, z_loss=st.sampled_from([0.0, 0.01]), reduction=st.sampled_from(["sum", "mean", "none"]))
def test_cross_entropy_equals_float64(device, path, case, z_loss, reduction):
    hidden, weight, labels, bias = inputs(case, device)
    labels = labels.masked_fill(torch.arange(len(labels), device=device) % 3 == 1, IGNORE)
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    softcap = case["softcap"]
    loss = linear_cross_entropy(
        leaves[0], leaves[1], labels, bias=None if bias is None else leaves[2], softcap=softcap,
        reduction=reduction, z_loss=z_loss,
    )  # fmt: skip
    expected, exact = float64_loss(hidden, weight, labels, bias, softcap, z_loss)
    if reduction != "none":
        expected = expected.sum() / ((labels != IGNORE).sum() if reduction == "mean" else 1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4, equal_nan=True)
    if reduction == "mean" and expected.isnan():  # no valid token
        return
    up = torch.rand_like(loss)
    eps = torch.finfo(case["dtype"]).eps
    for got, want in zip(
        torch.autograd.grad(loss, leaves, up), torch.autograd.grad(expected, exact, up.double()), strict=True
    ):
        assert got.dtype == case["dtype"]
        size = want.abs().amax().item() if want.numel() else 0.0
        # the gradient of a logit rounds to the dtype before it is summed over tokens or words
        torch.testing.assert_close(got.double(), want, rtol=4 * eps, atol=1e-5 + 4 * eps * size)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(device, reduction):
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True) for shape in ((5, 3), (7, 3), (7,))
    )
    labels = torch.tensor([0, 6, IGNORE, 3, 3], device=device)

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, labels, bias=bias, softcap=2.0, z_loss=0.1, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_many_chunks_equal_one(device, path, monkeypatch):
    hidden = torch.randn(130, 8, device=device, requires_grad=True)
    weight = torch.randn(50, 8, device=device, requires_grad=True)
    labels = torch.randint(50, (130,), device=device)

    def run():
        loss = linear_cross_entropy(hidden, weight, labels)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    whole = run()
    monkeypatch.setattr("ds_llm.kernels.linear_cross_entropy.CHUNK_BYTES", {device.type: 1, "cpu": 1})  # 128 rows
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_second_derivatives_are_refused(device, reduction):
    hidden, weight = (torch.randn(n, 8, device=device, requires_grad=True) for n in (4, 50))
    labels = torch.randint(50, (4,), device=device)
    loss = linear_cross_entropy(hidden.tanh(), weight, labels, reduction=reduction).square().sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        gradient.sum().backward()


@pytest.mark.parametrize("label", [-1, 50, 2**40])
def test_labels_outside_the_vocabulary_do_not_pass(device, path, label):
    hidden, weight = (torch.randn(n, 8, device=device) for n in (3, 50))
    labels = torch.tensor([1, label, 49], device=device)
    found = linear_token_stats(hidden, weight, labels)
    assert found.logprob.isnan().tolist() == [False, True, False] and not found.hit[1]
    if path == "torch":
        with pytest.raises(RuntimeError, match="out of bounds"):
            linear_cross_entropy(hidden, weight, labels)
    else:
        losses = linear_cross_entropy(hidden, weight, labels, reduction="none")
        assert losses.isnan().tolist() == [False, True, False]


def test_only_wanted_gradients_are_formed(device):
    hidden = torch.randn(4, 8, device=device, requires_grad=True)
    weight = torch.randn(50, 8, device=device)
    labels = torch.randint(50, (4,), device=device)
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    saved = loss.grad_fn.saved_tensors if hasattr(loss.grad_fn, "saved_tensors") else ()
    assert all(t.shape != weight.shape for t in saved)
    loss.backward()
    expected, (exact, _) = float64_loss(hidden, weight, labels, None, None, 0.0)
    torch.testing.assert_close(
        hidden.grad.double(), torch.autograd.grad(expected.sum(), exact)[0], rtol=1e-5, atol=1e-6
    )


def test_fp16_small_gradients_survive(device, path):
    """Probabilities below 6e-8 are 0 in fp16; their sum over a vocabulary is not."""
    V = 3000
    weight = torch.zeros(V, 2, dtype=torch.float16, device=device)
    weight[0, 0], weight[1:, 1] = 1.0, 1.0
    hidden = torch.tensor([[17.0, 0.0]], dtype=torch.float16, device=device, requires_grad=True)
    labels = torch.zeros(1, dtype=torch.long, device=device)
    (found,) = torch.autograd.grad(4096 * linear_cross_entropy(hidden, weight, labels), hidden)
    expected, (exact, _) = float64_loss(hidden, weight, labels, None, None, 0.0)
    (want,) = torch.autograd.grad(4096 * expected.sum(), exact)
    torch.testing.assert_close(found.double(), want, rtol=0.02, atol=0)


# --- registration and index arithmetic


def operator_calls(device: torch.device) -> list:
    hidden, weight, bias = (torch.randn(*s, device=device, requires_grad=True) for s in ((5, 8), (30, 8), (30,)))
    labels = torch.tensor([1, 2, IGNORE, 29, 0], device=device)
    upstream = torch.rand(5, device=device)
    frozen = hidden.detach(), weight.detach(), labels
    return [
        (_linear_token_stats, (*frozen, bias.detach(), 3.0, 0.5, 2)),
        (_linear_token_stats, (*frozen[:2], None, None, None, 1.0, None)),
        (_summed, (hidden, weight, labels, bias, None, 0.0, IGNORE, True, True, True)),
        (_summed, (hidden, frozen[1], labels, None, 2.0, 0.1, IGNORE, True, False, False)),
        (_per_token, (hidden, weight, labels, bias, None, 0.0, IGNORE)),
        (_per_token, (hidden, weight, labels, None, 2.0, 0.1, IGNORE)),
        (_per_token_backward, (upstream, *frozen, bias.detach(), 2.0, 0.1, IGNORE, True, False, True)),
    ]


@pytest.mark.parametrize("index", range(7))
def test_opcheck(device, index):
    operator, arguments = operator_calls(device)[index]
    torch.library.opcheck(operator, arguments)


def test_compiles_without_graph_breaks(device):
    hidden, weight = (torch.randn(n, 8, device=device, requires_grad=True) for n in (5, 30))
    labels = torch.tensor([1, 2, IGNORE, 29, 0], device=device)

    def both(hidden, weight, labels):
        stats = linear_token_stats(hidden, weight, labels)
        loss = linear_cross_entropy(hidden * 2, weight, labels)
        per_token = linear_cross_entropy(hidden, weight, labels, reduction="none")
        return loss + (per_token * stats.entropy).sum()

    plain = both(hidden, weight, labels)
    expected = torch.autograd.grad(plain, (hidden, weight))
    loss = torch.compile(both, fullgraph=True, backend="aot_eager")(hidden, weight, labels)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), expected)


def test_rows_past_two_to_the_31_elements(device):
    """Rows 2^30 elements apart: the third starts at 2^31. Memory that is not touched costs nothing on a CPU."""
    V, stride = 50, 2**30
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        buffer = torch.empty(2 * stride + V, dtype=torch.bfloat16, device=device)
        near = torch.empty(4, 3, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    logits = buffer.as_strided((3, V), (stride, 1))
    logits.copy_(torch.randn(3, V))
    labels, exact = torch.tensor([3, 49, 20], device=device), logits.double()
    hit = torch.zeros(3, dtype=torch.bool, device=device)
    _token_stats_kernel[(3,)](
        logits, labels, logits, near[0], near[1], near[2], hit, stride, V, 1.0, 1.0,
        LABELS=True, BIAS=False, SOFTCAP=False, TEMPERATURE=False, IGNORE=IGNORE, MASKED=MASKED, BLOCK=64,
    )  # fmt: skip
    check_stats((near[0], near[1], near[2], hit), exact, labels, torch.zeros_like(hit))
    _cross_entropy_kernel[(3,)](
        logits, labels, logits, near, near[3], stride, V, 1.0, 0.0, 1.0,
        BIAS=False, SOFTCAP=False, UPSTREAM=False, GRADIENT=True, BLOCK=64,
    )  # fmt: skip
    torch.testing.assert_close(near[3], -near[1])
    exact.requires_grad_()
    torch.nn.functional.cross_entropy(exact, labels, reduction="sum").backward()
    torch.testing.assert_close(logits.double(), exact.grad, rtol=1e-2, atol=1e-5)
