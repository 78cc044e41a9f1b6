"""Token statistics against float64; operators of statistics and of the cross-entropy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_cases import DTYPES, exact_logits, inputs, options, small
from torch.utils._python_dispatch import TorchDispatchMode

from ds_llm.kernels.cross_entropy_rows import _cross_entropy_kernel
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


@pytest.fixture(scope="module", autouse=True)
def several_steps():
    """Steps of 64 logits, so that vocabularies of hundreds take several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ds_llm.kernels.cross_entropy_rows.VOCAB_BLOCK", 64)
        patch.setattr("ds_llm.kernels.token_stats.TILE_VOCAB", 64)
        yield


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
