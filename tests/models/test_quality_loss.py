"""Quality losses against their formulas and their gradients against finite differences, in float64."""

import math

import pytest
import torch

from ds_llm.errors import UserError
from ds_llm.models import quality_loss
from ds_llm.models.quality_loss import QUALITY_LOSSES, QualityOptions, batch_loss, find, register_quality_loss

OPTIONS = QualityOptions(beta_target_mean=0.4, beta_target_var=0.07, w_mean=1.3, w_var=2.1, lambda_var=0.6)


def batch(layers: int = 3, rows: int = 2, length: int = 7):
    """Scores of layers [B, S, 1] in float64, and a mask with padding at the ends of rows."""
    scores = [2 * torch.randn(rows, length, 1, dtype=torch.float64) for _ in range(layers)]
    mask = torch.arange(length) < torch.randint(2, length, (rows, 1))
    return scores, mask


def formula(name: str, scores, mask) -> float:
    """The loss by its definition, in plain numbers."""
    layers = []
    for score in scores:
        gates = [1 / (1 + math.exp(-float(s))) for s in score[..., 0][mask]]
        m = math.fsum(gates) / len(gates)
        v = math.fsum((g - m) ** 2 for g in gates) / len(gates)
        layers.append({
            "sigmoid": m,
            "mse": math.fsum(g * g for g in gates) / len(gates),
            "beta_moment_matching": 1.3 * (m - 0.4) ** 2 + 2.1 * (v - 0.07) ** 2,
            "mean_variance_regularization": (m - 0.5) ** 2 - 0.6 * v,
            "ours": math.fsum(1 - abs(2 * g - 1) for g in gates) / len(gates),
        }[name])  # fmt: skip
    return math.fsum(layers) / len(layers)


@pytest.fixture
def ours():
    @register_quality_loss("ours")
    def decided(good, mask):
        """0 for gates that are open or closed, 1 for those in between."""
        return 1 - (2 * good - 1).abs()

    yield
    del QUALITY_LOSSES["ours"]


@pytest.mark.parametrize("name", ["sigmoid", "mse", "beta_moment_matching", "mean_variance_regularization", "ours"])
def test_values_and_gradients(name, ours):
    scores, mask = batch()
    value, terms = batch_loss(name, scores, mask, OPTIONS)
    assert float(value) == pytest.approx(formula(name, scores, mask), rel=1e-12)
    assert float(sum(terms.values())) == pytest.approx(float(value), rel=1e-12)
    leaves = [score.requires_grad_() for score in scores]
    assert torch.autograd.gradcheck(lambda *s: batch_loss(name, s, mask, OPTIONS)[0], leaves)
    # what is padding has no part in it
    other = [torch.where(mask[..., None], score, 9.0) for score in scores]
    assert torch.equal(batch_loss(name, other, mask, OPTIONS)[0], value)
    (grad,) = torch.autograd.grad(batch_loss(name, leaves, mask, OPTIONS)[0], leaves[0])
    assert grad[~mask].abs().max() == 0 if (~mask).any() else True
    assert grad[mask].abs().max() > 0


@pytest.mark.parametrize("name", ["contrastive", "ranking"])
def test_losses_over_pairs(name):
    documents = torch.tensor([[0, 0, 0, 1, 1, -1], [2, 2, 2, 2, -1, -1]])
    clean, copies = (batch(length=6)[0] for _ in range(2))

    def total(*scores):
        means = [quality_loss.sample_scores(part, documents, 3) for part in (scores[:3], scores[3:])]
        return find(name).function(*means).sum()

    expected = 0.0
    for number in range(3):
        inside = documents == number
        good, bad = (float(torch.stack([s[..., 0][inside].mean() for s in part]).mean()) for part in (clean, copies))
        probability = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
        if name == "contrastive":
            expected -= (math.log(probability(good)) + math.log(1 - probability(bad))) / 2
        else:
            expected -= math.log(probability(good - bad))
    leaves = [score.requires_grad_() for score in (*clean, *copies)]
    assert float(total(*leaves).detach()) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(total, leaves)
    with pytest.raises(UserError, match="compares samples with corrupted copies"):
        batch_loss(name, clean, None, OPTIONS)


def test_the_loss_over_the_models_own_losses():
    documents = torch.tensor([[0, 0, 0, 1, 1, -1], [2, 2, 2, 2, -1, -1]])
    scores, surprise = batch(length=6)[0], torch.randn(3, dtype=torch.float64)

    def total(*scores):
        return find("loss_aware").function(quality_loss.sample_scores(scores, documents, 3), surprise).sum()

    means = [float(torch.stack([s[..., 0][documents == n].mean() for s in scores]).mean()) for n in range(3)]
    expected = math.fsum((10 * mean + float(z)) ** 2 for mean, z in zip(means, surprise, strict=True))
    leaves = [score.requires_grad_() for score in scores]
    assert float(total(*leaves).detach()) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(total, leaves)
    (gradient,) = torch.autograd.grad(total(*leaves), leaves[:1])
    assert gradient[documents < 0].abs().max() == 0 and gradient[documents >= 0].abs().min() > 0
    with pytest.raises(UserError, match="needs the model's own loss on each sample"):
        batch_loss("loss_aware", scores, None, OPTIONS)


def test_mistakes_are_named(ours):
    scores, mask = batch()
    with pytest.raises(UserError, match="did you mean sigmoid"):
        find("sigmod")
    QUALITY_LOSSES["ours"] = quality_loss.QualityLoss("tokens", lambda good, mask: good.mean())
    with pytest.raises(UserError, match=r"must have the shape \(2, 7\), not \(\)"):
        batch_loss("ours", scores, mask, OPTIONS)


def test_debugging_prints_the_terms():
    scores, mask = batch()
    powers = quality_loss.power_sums(scores, mask) / mask.sum()
    _, terms = batch_loss("beta_moment_matching", scores, mask, OPTIONS)
    line = quality_loss.describe("beta_moment_matching", powers, terms)
    mean = torch.cat([score[..., 0][mask] for score in scores]).sigmoid().mean()
    assert f"(mean {float(terms['mean']):.4g}, variance {float(terms['variance']):.4g})" in line
    assert f"gates: mean {float(mean):.4f}" in line
