"""Preference losses against formulas written out in Python floats, their gradients, and how they split and refuse."""

import math

import pytest
import torch

from ds_llm.errors import ConfigError
from ds_llm.train.losses.preference import LOSSES, METRICS, REFERENCE_FREE, Preference, log1mexp


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(p: Preference, pi_c, pi_r, ref_c, ref_r, n_c, n_r) -> tuple[float, list[float]]:
    """Loss and figures of one pair."""
    mean_c, mean_r = pi_c / n_c, pi_r / n_r
    if p.loss in REFERENCE_FREE:
        reward_c, reward_r = p.beta * mean_c, p.beta * mean_r
    elif p.reduction == "mean":
        reward_c, reward_r = p.beta * (pi_c - ref_c) / n_c, p.beta * (pi_r - ref_r) / n_r
    else:
        reward_c, reward_r = p.beta * (pi_c - ref_c), p.beta * (pi_r - ref_r)
    margin, e = reward_c - reward_r, p.label_smoothing
    if p.loss == "sigmoid":
        loss = -(1 - e) * math.log(sigmoid(margin)) - e * math.log(sigmoid(-margin))
    elif p.loss == "simpo":
        x = margin - p.simpo_gamma
        loss = -(1 - e) * math.log(sigmoid(x)) - e * math.log(sigmoid(-x))
    elif p.loss == "ipo":
        loss = (margin / p.beta - 1 / (2 * p.beta)) ** 2
    elif p.loss == "hinge":
        loss = max(0.0, 1 - margin)
    else:
        odds = [math.exp(m) / (1 - math.exp(m)) for m in (mean_c, mean_r)]
        loss = -p.beta * math.log(sigmoid(math.log(odds[0] / odds[1])))
    return loss - p.sft_weight * mean_c, [reward_c, reward_r, margin, float(margin > 0), pi_c, pi_r]


def batch(pairs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (2, pairs), generator=random)
    policy = -lengths * (0.2 + 2 * torch.rand(2, pairs, generator=random, dtype=torch.float64))
    return policy, policy + torch.randn(2, pairs, generator=random, dtype=torch.float64), lengths


CASES = [Preference(loss=name, beta=0.3) for name in LOSSES]
CASES += [Preference(loss=name, beta=0.7, reduction="mean", sft_weight=0.4) for name in LOSSES]
CASES += [Preference(reduction="sum", loss=name) for name in ("sigmoid", "ipo", "hinge")]
CASES += [Preference(label_smoothing=0.2), Preference("simpo", beta=2.0, label_smoothing=0.1, simpo_gamma=1.2)]


@pytest.mark.parametrize("loss", CASES, ids=str)
def test_matches_the_formulas(loss):
    policy, reference, lengths = batch(17, seed=len(str(loss)))
    policy.requires_grad_()
    total, sums = loss(policy, None if loss.loss in REFERENCE_FREE else reference, lengths)
    expected = [
        by_hand(loss, *(t[i, k].item() for t in (policy, reference, lengths) for i in (0, 1))) for k in range(17)
    ]
    assert total.item() == pytest.approx(sum(e for e, _ in expected), rel=1e-12)
    for k, name in enumerate(METRICS):
        assert sums[k].item() == pytest.approx(sum(f[k] for _, f in expected), rel=1e-12), name
    # the gradient is the slope of the formula
    total.backward()
    for i, k in ((0, 3), (1, 3), (0, 16)):
        moved = []
        for step in (1e-5, -1e-5):
            values = policy.detach().clone()
            values[i, k] += step
            moved.append(by_hand(loss, *(t[j, k].item() for t in (values, reference, lengths) for j in (0, 1)))[0])
        slope = (moved[0] - moved[1]) / 2e-5
        assert policy.grad[i, k].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("loss", CASES, ids=str)
def test_is_a_sum_over_pairs(loss):
    """Any split into micro-batches gives the same sums, so that dividing by all pairs is right for each."""
    policy, reference, lengths = batch(12, seed=3)
    whole, sums = loss(policy, reference, lengths)
    parts = [loss(*(t[:, a:b] for t in (policy, reference, lengths))) for a, b in ((0, 1), (1, 7), (7, 12))]
    assert sum(p for p, _ in parts).item() == pytest.approx(whole.item(), rel=1e-12)
    assert torch.allclose(sum(s for _, s in parts), sums)


def test_policy_equal_to_the_reference():
    policy, _, lengths = (t.float() if t.is_floating_point() else t for t in batch(64, seed=5))
    for smoothing in (0.0, 0.3):
        total, sums = Preference(label_smoothing=smoothing)(policy, policy.clone(), lengths)
        assert total.item() / 64 == pytest.approx(math.log(2), rel=1e-6)
    assert sums[:3].tolist() == [0, 0, 0] and sums[3] == 32


def test_certain_answers_keep_gradients_finite():
    """A probability that rounds to 1 has infinite odds; the loss stays finite, and so do its gradients."""
    policy = torch.tensor([[-1e-12, 0.0, -500.0], [-500.0, 0.0, -1e-12]], requires_grad=True)
    total, _ = Preference("orpo")(policy, None, torch.ones(2, 3, dtype=torch.int64))
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(policy.grad).all()


def test_log1mexp():
    x = -torch.logspace(-12, 2, 200, dtype=torch.float64)
    expected = [math.log(-math.expm1(v)) if v > -0.5 else math.log1p(-math.exp(v)) for v in x.tolist()]
    assert torch.allclose(log1mexp(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


def test_refuses_what_a_loss_does_not_have():
    for wrong, key in (
        ({"loss": "kto"}, "dpo.loss"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "dpo.label_smoothing"),
        ({"loss": "orpo", "reduction": "sum"}, "dpo.reduction"),
    ):
        with pytest.raises(ConfigError, match=key):
            Preference(**wrong)
