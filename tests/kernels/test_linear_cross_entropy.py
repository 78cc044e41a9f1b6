"""The linear cross-entropy against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_cases import exact_logits, inputs, options, small

from ds_llm.kernels.cross_entropy_rows import cross_entropy_rows, rows_triton
from ds_llm.kernels.token_stats import IGNORE, linear_cross_entropy, linear_token_stats

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
