"""Routing, permutation and their gradients against float64 references, on the torch path and on the Triton kernels.

Without a GPU the kernels run in Triton's interpreter.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_llm.kernels import moe_permute, moe_routing
from ds_llm.kernels.moe_routing import load_balancing_loss, permute, route, unpermute, z_loss
from ds_llm.kernels.moe_sort import sort

pytestmark = pytest.mark.usefixtures("path", "poisoned")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXAMPLES = settings(max_examples=25)


def _route64(logits, top_k, scoring, normalize, bias, mask, group, groups):
    """Plain float64 definition of `route`, token by token."""
    x = logits.double()
    weights, experts = [], []
    counts, tokens = torch.zeros(groups, x.shape[1]), torch.zeros(groups)
    scores, z = [x.new_zeros(x.shape[1]) for _ in range(groups)], [x.new_zeros(()) for _ in range(groups)]
    for t, row in enumerate(x):
        s = row.softmax(-1) if scoring == "softmax" else row.sigmoid()
        key = row if bias is None else s.float().double() + bias.double()
        open_experts = [e for e in range(len(row)) if row[e] > -torch.inf and (mask is None or mask[t])]
        best = sorted(open_experts, key=lambda e, key=key: (-key[e].item(), e))[:top_k]
        rest = top_k - len(best)
        w = s[best]
        if normalize:
            w = w / (w.sum() + 1e-20)
        weights.append(torch.cat([w, w.new_zeros(rest)]))
        experts.append(best + [-1] * rest)
        if best:
            g = group[t]
            counts[g, best] += 1
            tokens[g] += 1
            scores[g] = scores[g] + (s if scoring == "softmax" else s / (s.sum() + 1e-20))
            z[g] = z[g] + row.logsumexp(-1) ** 2
    weights = torch.stack(weights) if weights else x.new_zeros(0, top_k)
    return weights, torch.tensor(experts, dtype=torch.int32).view(-1, top_k), counts, scores, z, tokens


def _draw_logits(kind, tokens, experts, generator):
    x = torch.randn(tokens, experts, generator=generator)
    if kind == "extreme":
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.5, 1e4, -1e4) + 8 * x.round()
    elif kind == "equal":
        x = torch.full_like(x, float(torch.randn((), generator=generator)))
    elif kind == "masked":
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.4, -torch.inf, x)
    elif kind == "ties":
        x = x.round()
    return x


@EXAMPLES
@given(data=st.data())
def test_route_is_its_definition(device, data):
    draw = data.draw
    experts = draw(st.integers(1, 37))
    top_k = draw(st.integers(1, min(experts, 6)))
    groups = draw(st.integers(1, 3))
    tokens = groups * draw(st.sampled_from([0, 1, 2, 7]))
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    scoring, normalize = draw(st.sampled_from(["softmax", "sigmoid"])), draw(st.booleans())
    kind = draw(st.sampled_from(["normal", "extreme", "equal", "masked", "ties"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    values = _draw_logits(kind, tokens, experts, generator).to(dtype)
    bias = torch.randn(experts, generator=generator) if draw(st.booleans()) else None
    mask = torch.rand(tokens, generator=generator) < 0.8 if draw(st.booleans()) else None
    group, sequences = [t * groups // max(1, tokens) for t in range(tokens)], groups
    if draw(st.booleans()):  # packed sequences of other lengths
        cuts = sorted(draw(st.integers(0, tokens)) for _ in range(groups - 1))
        sequences = torch.tensor([0, *cuts, tokens])
        group = [sum(t >= c for c in cuts) for t in range(tokens)]
    wide = torch.empty(tokens, 2 * experts, dtype=dtype).to(device)
    wide[:, ::2] = values.to(device)
    logits = (wide[:, ::2] if draw(st.booleans()) else values.clone().to(device)).requires_grad_()
    exact = values.double().requires_grad_()
    bias_, mask_ = (None if x is None else x.to(device) for x in (bias, mask))
    sequences_ = sequences.to(device) if isinstance(sequences, torch.Tensor) else sequences
    weights, chosen, stats = route(
        logits, top_k, scoring=scoring, normalize=normalize, bias=bias_, mask=mask_, sequences=sequences_
    )
    want = _route64(exact, top_k, scoring, normalize, bias, mask, group, groups)
    assert weights.dtype == torch.float32 and chosen.dtype == torch.int32
    if bias is None or kind == "normal":  # else float32 scores + bias tie where float64 ones do not
        assert torch.equal(chosen.cpu(), want[1])
    else:
        torch.testing.assert_close((chosen.cpu() >= 0).sum(1), (want[1] >= 0).sum(1))
        return
    torch.testing.assert_close(weights.cpu().double(), want[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(stats.counts.cpu(), want[2].int())
    assert torch.equal(stats.tokens.cpu(), want[5].int())
    torch.testing.assert_close(stats.scores.cpu().double(), torch.stack(want[3]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.z.cpu().double(), torch.stack(want[4]), rtol=1e-5, atol=1e-5)

    gw = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
    gs = torch.randn(groups, experts, generator=generator, dtype=torch.float64)
    gz = torch.randn(groups, generator=generator, dtype=torch.float64) / (1 if kind == "normal" else 1e5)
    use_stats = draw(st.booleans())
    loss = (weights * gw.to(device)).sum()
    exact_loss = (want[0] * gw).sum()
    if use_stats:
        loss = loss + (stats.scores * gs.to(device)).sum() + (stats.z * gz.to(device)).sum()
        exact_loss = exact_loss + (torch.stack(want[3]) * gs).sum() + (torch.stack(want[4]) * gz).sum()
    if exact_loss.requires_grad:
        exact_loss.backward()
    loss.backward()
    want_grad = torch.zeros_like(exact) if exact.grad is None else exact.grad.nan_to_num(0.0)
    tolerance = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}[{v: k for k, v in DTYPES.items()}[dtype]]
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.cpu().double(), want_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("experts", [64, 512])
def test_route_of_many_experts_and_tokens(device, path, experts):
    tokens, top_k = 400 if path == "torch" else 40, 8  # several pieces of the torch path
    logits = torch.randn(tokens, experts, device=device).requires_grad_()
    weights, chosen, stats = route(logits, top_k)
    exact = logits.detach().double().requires_grad_()
    probability = exact.softmax(-1)
    best, index = probability.topk(top_k)
    want = best / best.sum(-1, keepdim=True)
    assert torch.equal(chosen.long(), index)
    torch.testing.assert_close(weights.double(), want, rtol=1e-5, atol=1e-7)
    assert torch.equal(stats.counts[0].long(), torch.bincount(index.flatten(), minlength=experts))
    gw, scale = torch.randn_like(want), torch.randn(2, device=device)
    balance = experts * (torch.bincount(index.flatten(), minlength=experts) / (tokens * top_k) * probability.mean(0))
    want_loss = (want * gw).sum() + scale[0] * balance.sum() + scale[1] * exact.logsumexp(-1).square().mean()
    loss = (weights * gw).sum() + scale[0] * load_balancing_loss(stats) + scale[1] * z_loss(stats)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    want_loss.backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_nan_logits_show_in_the_weights_and_choose_real_experts(device):
    logits = torch.randn(6, 5, device=device)
    logits[2, 3] = torch.nan
    logits[4] = torch.nan
    weights, chosen, stats = route(logits, 2)
    assert ((chosen >= 0) & (chosen < 5)).all()
    assert weights[[2, 4]].isnan().any(1).all() and weights[[0, 1, 3, 5]].isfinite().all()
    assert stats.z.isnan().all()


def test_balance_loss_is_one_when_uniform_and_counts_sequences_apart(device):
    uniform = route(torch.zeros(8, 4, device=device), 4, sequences=2)[2]
    assert load_balancing_loss(uniform).item() == pytest.approx(1)
    assert load_balancing_loss(uniform, per_sequence=True).item() == pytest.approx(1)
    # each sequence sends all its tokens to one expert, another one each: balanced over the batch only
    logits = torch.full((4, 2), -20.0, device=device)
    logits[:2, 0] = logits[2:, 1] = 20.0
    stats = route(logits, 1, sequences=2)[2]
    assert load_balancing_loss(stats).item() == pytest.approx(1)
    assert load_balancing_loss(stats, per_sequence=True).item() == pytest.approx(2)


def _permute_reference(x, experts, num_experts):
    rows, offsets, inverse = [], [], torch.empty(experts.shape, dtype=torch.int64)
    masked = []
    flat = experts.tolist()
    for e in range(num_experts):
        for t, choices in enumerate(flat):
            for k, choice in enumerate(choices):
                if choice == e:
                    inverse[t, k] = len(rows)
                    rows.append(x[t])
        offsets.append(len(rows))
    for t, choices in enumerate(flat):
        for k, choice in enumerate(choices):
            if not 0 <= choice < num_experts:
                inverse[t, k] = ~(len(rows) + len(masked))
                masked.append(torch.zeros_like(x[t]))
    rows = torch.stack(rows + masked) if rows or masked else x.new_zeros(0, x.shape[1])
    return rows, torch.tensor(offsets, dtype=torch.int32), inverse.int()


@EXAMPLES
@given(data=st.data())
def test_permute_and_unpermute_are_their_definitions(device, data):
    draw = data.draw
    tokens, top_k, num_experts = draw(st.integers(0, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 19))
    width = draw(st.sampled_from([1, 3, 16, 33]))
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    low = draw(st.sampled_from([-2, 0]))
    experts = torch.randint(low, num_experts, (tokens, top_k), generator=generator)
    if draw(st.booleans()):  # most experts stay empty
        experts = torch.where(experts >= 0, experts % 2 * (num_experts - 1), experts)
    if draw(st.booleans()):
        experts = experts.int()
    base = torch.randn(width, tokens, generator=generator).to(dtype).to(device)
    x = (base.t() if draw(st.booleans()) else base.t().contiguous()).requires_grad_()
    rows, offsets, inverse = permute(x, experts.to(device), num_experts)
    want = _permute_reference(x.detach().cpu(), experts, num_experts)
    assert torch.equal(rows.detach().cpu(), want[0])
    assert torch.equal(offsets.cpu(), want[1])
    assert torch.equal(inverse.cpu(), want[2])
    assert offsets.dtype == inverse.dtype == torch.int32

    given_weights = draw(st.booleans())
    weights = torch.rand(tokens, top_k, generator=generator).to(device).requires_grad_() if given_weights else None
    # what stands behind the last expert's rows must not be read
    poisoned = rows.detach().clone()
    if num_experts and tokens:
        poisoned[int(offsets[-1]) :] = torch.nan
    poisoned.requires_grad_()
    out = unpermute(poisoned, inverse, weights)
    valid = ((experts >= 0) & (experts < num_experts)).double()
    x64 = x.detach().cpu().double()
    rows64 = poisoned.detach().cpu().double().nan_to_num(0.0).requires_grad_()
    w64 = (torch.ones(tokens, top_k) if weights is None else weights.detach().cpu()).double().requires_grad_()
    picked = rows64[torch.where(want[2] < 0, ~want[2], want[2]).long()]
    out64 = (picked * (w64 * valid)[..., None]).sum(1)
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out.detach().cpu().double(), out64.detach(), rtol=tolerance, atol=tolerance)
    grad = torch.randn(tokens, width, generator=generator).to(dtype)
    out.backward(grad.to(device))
    out64.backward(grad.double())
    torch.testing.assert_close(poisoned.grad.cpu().double(), rows64.grad, rtol=tolerance, atol=tolerance)
    if given_weights:
        torch.testing.assert_close(weights.grad.cpu().double(), w64.grad * valid, rtol=1e-4, atol=1e-4)
    row_grad = torch.randn(rows.shape, generator=generator).to(dtype)
    rows.backward(row_grad.to(device))
    picked_grad = row_grad.double()[torch.where(want[2] < 0, ~want[2], want[2]).long()] * valid[..., None]
    torch.testing.assert_close(x.grad.cpu().double(), picked_grad.sum(1), rtol=tolerance, atol=tolerance)
    assert x64.shape == x.shape


def test_sort_of_several_blocks_is_stable(device):
    experts = torch.randint(-1, 70, (133, 4), device=device)
    offsets, inverse = sort(experts, 70)
    bucket = torch.where(experts < 0, 70, experts).flatten()
    order = torch.sort(bucket, stable=True).indices
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
    place = place.view_as(experts)
    assert torch.equal(inverse.long(), torch.where(experts < 0, ~place, place))
    assert torch.equal(offsets.long(), torch.bincount(bucket, minlength=71)[:70].cumsum(0))


def test_float64_gradients_pass_gradcheck(device, path):
    if path == "triton" and not torch.cuda.is_available():
        pytest.skip("float64 goes to the torch path")
    logits = torch.randn(5, 6, dtype=torch.float64, device=device, requires_grad=True)

    def routed(x):
        weights, _, stats = route(x, 2, scoring="sigmoid")
        return weights, stats.scores, stats.z

    assert torch.autograd.gradcheck(routed, logits)
    experts = torch.randint(-1, 4, (5, 2), device=device)
    x = torch.randn(5, 3, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.rand(5, 2, dtype=torch.float64, device=device, requires_grad=True)

    def moved(x, weights):
        rows, _, inverse = permute(x, experts, 4)
        return unpermute(rows.sin(), inverse, weights)

    assert torch.autograd.gradcheck(moved, (x, weights))


def test_every_output_element_is_written(device):
    logits = torch.randn(29, 9, device=device).requires_grad_()
    mask = torch.rand(29, device=device) < 0.7
    weights, experts, stats = route(logits, 3, mask=mask, sequences=torch.tensor([0, 0, 20, 29], device=device))
    x = torch.randn(29, 21, device=device).requires_grad_()
    rows, offsets, inverse = permute(x, experts, 9)
    out = unpermute(rows, inverse, weights)
    (out.square().sum() + stats.scores.square().sum() + stats.z.sum()).backward()
    for tensor in (weights, rows, out, logits.grad, x.grad, stats.scores, stats.z):
        assert tensor.isfinite().all()
    for tensor in (experts, offsets, inverse, stats.counts, stats.tokens):
        assert (tensor < 100).all()
    assert (logits.grad[~mask] == 0).all()
    assert stats.tokens.tolist() == [0, int(mask[:20].sum()), int(mask[20:].sum())]


def test_repeated_runs_are_bitwise_equal(device):
    logits, x = torch.randn(70, 16, device=device), torch.randn(70, 24, device=device)
    results = []
    for _ in range(2):
        a, b = logits.clone().requires_grad_(), x.clone().requires_grad_()
        weights, experts, stats = route(a, 2)
        rows, _, inverse = permute(b, experts, 16)
        out = unpermute(rows.tanh(), inverse, weights)
        (out.square().sum() + stats.scores.square().sum()).backward()
        results.append((out, stats.scores, a.grad, b.grad))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_operators_are_registered_completely(device):
    logits = torch.randn(6, 5, device=device, requires_grad=True)
    bias, mask = torch.randn(5, device=device), torch.rand(6, device=device) < 0.8
    bounds = torch.tensor([0, 2, 6], device=device)
    torch.library.opcheck(moe_routing._route, (logits, 2, False, True, None, None, None, 2))
    torch.library.opcheck(moe_routing._route, (logits, 2, True, True, bias, mask, bounds, 2))
    experts = torch.randint(-1, 4, (6, 2), device=device)
    torch.library.opcheck(sort, (experts, 4))
    _, inverse = sort(experts, 4)
    x, rows = (torch.randn(n, 7, device=device, requires_grad=True) for n in (6, 12))
    weights = torch.rand(6, 2, device=device, requires_grad=True)
    torch.library.opcheck(moe_permute._scatter, (x, inverse))
    torch.library.opcheck(moe_permute._gather, (rows, inverse, weights))
    torch.library.opcheck(moe_permute._gather, (rows, inverse, None))


def test_compiles_as_one_graph(device):
    def block(logits, x):
        weights, experts, stats = route(logits, 2, sequences=2)
        rows, offsets, inverse = permute(x, experts, 4)
        return unpermute(rows * offsets[-1], inverse, weights), load_balancing_loss(stats)

    inputs = [torch.randn(8, 4, device=device), torch.randn(8, 6, device=device)]
    results = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, loss = run(*leaves)
        (out.square().sum() + loss).backward()
        results.append((out, loss, *(x.grad for x in leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_wrong_arguments_are_named():
    logits = torch.randn(4, 3)
    for kwargs, message in (
        ({"top_k": 4}, "top_k must be 1 to 3"),
        ({"top_k": 1, "scoring": "tanh"}, "softmax or sigmoid"),
        ({"top_k": 1, "sequences": 3}, "not 3 sequences"),
        ({"top_k": 1, "bias": torch.zeros(4)}, "bias must be"),
        ({"top_k": 1, "mask": torch.ones(4)}, "mask must be bool"),
    ):
        with pytest.raises(ValueError, match=message):
            route(logits, **kwargs)
    with pytest.raises(ValueError, match="integers"):
        permute(logits, torch.zeros(4, 1), 2)
    with pytest.raises(ValueError, match="must have the shape of inverse"):
        unpermute(torch.zeros(4, 2), torch.zeros(4, 1, dtype=torch.int32), torch.zeros(4, 2))


def test_offsets_past_int32_do_not_overflow(device, monkeypatch):
    """Views whose last token lies 2^31 elements behind the first; only the touched pages take memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    base = torch.empty((1 << 31) + 64, dtype=torch.bfloat16, device=device)
    far = base.as_strided((3, 16), (1 << 30, 1))
    far.copy_(torch.randn(3, 16))
    near = far.clone()
    results = []
    for x in (far, near):
        leaf = x.detach().requires_grad_()
        weights, experts, stats = route(leaf, 2)
        rows, _, inverse = permute(leaf, experts[:, :1], 16)
        picked = unpermute(leaf, inverse, weights[:, :1])
        (weights.sum() + stats.z.sum() + (rows * rows).sum() + (picked * picked).sum()).backward()
        results.append((weights, experts, stats.z, rows, picked, leaf.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
