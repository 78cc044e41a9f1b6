"""The mixture-of-experts block against a loop over tokens and experts in float64, gradients included."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_llm.models.moe import MoEBlock, grouped_linear


@pytest.fixture(autouse=True, scope="module")
def uninitialised_memory_is_nan():
    """Fresh memory holds NaN in this mode, so that what must not be read shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(hidden=16, width=24, experts=5, top_k=2, shared=0, **options) -> MoEBlock:
    config = SimpleNamespace(
        hidden_size=hidden,
        moe_intermediate_size=width,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_shared_experts=shared,
        router_bias_speed=0.0,
        **{"scoring_func": "softmax", "norm_topk_prob": True, "aux_loss_alpha": 0.1, "seq_aux": True, "z_loss_alpha": 0}
        | options,
    )
    block = MoEBlock(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
    return block


def brute_force(p: dict, block: MoEBlock, hidden, mask):
    """Output, auxiliary loss and counts, a token and an expert at a time; `p` holds the parameters in float64."""

    def swiglu_mlp(x, gate_up, down):
        gate, up = (gate_up @ x).chunk(2)
        return down @ (F.silu(gate) * up)

    experts, k = block.gate.weight.shape[0], block.top_k
    shared = None
    if block.shared_experts is not None:
        gate_up = torch.cat([p["shared_experts.gate_proj.weight"], p["shared_experts.up_proj.weight"]])
        shared = (gate_up, p["shared_experts.down_proj.weight"])
    out, counts = torch.zeros_like(hidden), torch.zeros(experts, dtype=torch.int32)
    f = torch.zeros(hidden.shape[0], experts, dtype=torch.float64)  # how often each sequence chose each expert
    shares = [[] for _ in hidden]
    z = []
    for b in range(hidden.shape[0]):
        for s in range(hidden.shape[1]):
            x = hidden[b, s]
            if shared is not None:
                out[b, s] = swiglu_mlp(x, *shared)
            if not mask[b, s]:
                continue
            logits = p["gate.weight"] @ x
            scores = logits.softmax(0) if block.scoring == "softmax" else logits.sigmoid()
            shares[b].append(scores if block.scoring == "softmax" else scores / scores.sum())
            z.append(logits.logsumexp(0) ** 2)
            chosen = scores.topk(k).indices
            weights = scores[chosen] / (scores[chosen].sum() + 1e-20) if block.normalize else scores[chosen]
            for w, e in zip(weights, chosen.tolist(), strict=True):
                out[b, s] = out[b, s] + w * swiglu_mlp(x, p["experts.gate_up_proj"][e], p["experts.down_proj"][e])
                counts[e] += 1
                f[b, e] += 1
    if block.seq_aux:  # alpha * mean over sequences of sum_e count_e / (T k / E) * mean_t score_e
        losses = [
            (f[b] / (len(rows) * k / experts) * torch.stack(rows).mean(0)).sum()
            for b, rows in enumerate(shares)
            if rows
        ]
        balance = sum(losses) / len(losses)
    else:  # alpha * sum_e E f_e P_e
        rows = torch.stack([row for part in shares for row in part])
        balance = (experts * f.sum(0) / (len(rows) * k) * rows.mean(0)).sum()
    return out, block.aux_loss_alpha * balance + block.z_loss_alpha * sum(z) / len(z), balance, counts


@settings(max_examples=40)
@given(
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    normalize=st.booleans(),
    per_sequence=st.booleans(),
    z=st.sampled_from([0.0, 0.05]),
    shared=st.integers(0, 2),
    sizes=st.sampled_from([(16, 24), (12, 10), (7, 5)]),  # the first fits the grouped product, the last does not
    experts=st.sampled_from([(1, 1), (4, 1), (5, 2), (8, 8)]),
    shape=st.sampled_from([(1, 1), (1, 9), (3, 6)]),
    padded=st.booleans(),
)
def test_block_equals_brute_force(scoring, normalize, per_sequence, z, shared, sizes, experts, shape, padded):
    block = make(
        *sizes,
        experts=experts[0],
        top_k=experts[1],
        shared=shared,
        scoring_func=scoring,
        norm_topk_prob=normalize,
        seq_aux=per_sequence,
        z_loss_alpha=z,
    )
    hidden = torch.randn(*shape, sizes[0], requires_grad=True)
    mask = torch.rand(shape) > 0.3 if padded else torch.ones(shape, dtype=torch.bool)
    mask[0, -1] = True
    upstream, upstream_aux = torch.randn(*shape, sizes[0]), torch.rand(())
    out, aux, balance, counts = block(hidden, mask if padded else None)
    ((out * upstream).sum() + aux * upstream_aux).backward()

    exact = {n: p.detach().double().requires_grad_() for n, p in block.named_parameters()}
    hidden64 = hidden.detach().double().requires_grad_()
    expected = brute_force(exact, block, hidden64, mask)
    ((expected[0] * upstream).sum() + expected[1] * upstream_aux).backward()

    close = {"rtol": 2e-5, "atol": 2e-5, "check_dtype": False}
    torch.testing.assert_close(out, expected[0], **close)
    torch.testing.assert_close(aux, expected[1], **close)
    torch.testing.assert_close(balance, expected[2].detach(), **close)
    assert counts.tolist() == expected[3].tolist() and not balance.requires_grad
    torch.testing.assert_close(hidden.grad, hidden64.grad, rtol=1e-4, atol=1e-4, check_dtype=False)
    for name, parameter in block.named_parameters():
        reference = exact[name].grad if exact[name].grad is not None else torch.zeros_like(exact[name])
        torch.testing.assert_close(
            parameter.grad,
            reference,
            rtol=1e-4,
            atol=1e-4,
            check_dtype=False,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("sizes", [(16, 24), (7, 5)])
def test_experts_without_a_token_get_a_zero_gradient(sizes):
    block = make(*sizes, experts=6, top_k=1)
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.weight[4, 0] = 10.0
    hidden = torch.randn(2, 5, sizes[0])
    hidden[..., 0] = hidden[..., 0].abs() + 1  # every token goes to expert 4
    out, aux, _, counts = block(hidden)
    assert counts.tolist() == [0, 0, 0, 0, 10, 0]
    (out.square().sum() + aux).backward()
    for parameter in block.experts.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        used = parameter.grad.flatten(1).abs().sum(1) > 0
        assert used.tolist() == [False] * 4 + [True, False]


def test_uniform_routing_has_balance_one_and_skewed_routing_more():
    block = make(experts=4, top_k=4, aux_loss_alpha=1.0)
    torch.testing.assert_close(block(torch.randn(2, 8, 16))[2], torch.tensor(1.0))  # all experts are always chosen
    block = make(experts=4, top_k=1)
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.weight[2, 0] = 50.0
    hidden = torch.randn(2, 8, 16)
    hidden[..., 0] = hidden[..., 0].abs() + 1
    torch.testing.assert_close(block(hidden)[2], torch.tensor(4.0))  # all tokens to one of 4 experts


@settings(max_examples=25)
@given(
    sizes=st.sampled_from([(8, 16), (6, 3)]),
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    behind=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_grouped_product_equals_a_product_per_expert(sizes, counts, behind, dtype):
    weight = torch.randn(len(counts), sizes[1], sizes[0]).to(dtype).requires_grad_()
    rows = torch.randn(sum(counts) + behind, sizes[0]).to(dtype)
    offsets = torch.tensor(counts).cumsum(0).int()
    found = grouped_linear(rows, weight, offsets)
    assert found.shape == (len(rows), sizes[1]) and found.dtype == dtype
    start = 0
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    for expert, count in enumerate(counts):
        part = slice(start, start := start + count)
        torch.testing.assert_close(found[part], rows[part] @ weight[expert].t(), **tolerance)
    found[:start].float().sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()
    for expert, count in enumerate(counts):
        assert bool(weight.grad[expert].any()) == (count > 0)


def test_router_scores_in_float32_under_autocast():
    block = make().to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = block.gate(torch.randn(3, 16, dtype=torch.bfloat16))
        out = block(torch.randn(2, 3, 16, dtype=torch.bfloat16))[0]
    assert logits.dtype == torch.float32 and out.isfinite().all()
