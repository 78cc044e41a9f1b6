"""Losses on the gates of a Select-MoE model (`ds_llm.models.quality_gate`).

Four kinds, by what a loss is averaged over:

- tokens: one loss per token, averaged over the tokens that are not padding.
- moments: a function of the mean m and the variance v of the gates over those tokens.
- pairs: one loss per pair of a sample and its corrupted copy, averaged over pairs.
- losses: one loss per sample, from its score and the model's own loss on it, averaged over samples.

The first two kinds are computed for each layer and averaged over layers. In training (`ds_llm.train.modes.router`) all
averages are over the global batch. A model that computes its loss itself takes the first two kinds over its own batch,
and cannot compute the other two.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_llm.errors import UserError


@dataclass(frozen=True)
class QualityOptions:
    """What the moment losses aim at: mean and variance of the gates, and the weights of their terms."""

    beta_target_mean: float = 0.5
    beta_target_var: float = 0.05
    w_mean: float = 1.0
    w_var: float = 1.0
    lambda_var: float = 0.1


@dataclass(frozen=True)
class QualityLoss:
    """A loss and its kind, `over`: tokens, moments, pairs or losses. `function` takes

    - tokens: gates in (0, 1) [B, S] and mask [B, S] bool -> losses [B, S];
    - moments: mean [L] and variance [L] of each layer's gates, `QualityOptions` -> {term: [L]}, which are summed;
    - pairs: mean scores (before the sigmoid) of samples [N] and of their corrupted copies [N] -> losses [N];
    - losses: mean scores of samples [N] and their surprise [N]: the mean cross-entropy per token that the model has on
      each with its gates open, less the mean over the samples of the global batch, by their standard deviation ->
      losses [N].
    """

    over: str
    function: Callable


# standard deviation that `loss_aware` gives the mean scores of samples. Scores of tokens stand several times further
# apart, and where the sigmoid saturates the mean of gates, by which samples are picked, does not follow that of scores
SPREAD = 0.1
KINDS = ("tokens", "moments", "pairs", "losses")
QUALITY_LOSSES: dict[str, QualityLoss] = {}


def register_quality_loss(name: str, over: str = "tokens") -> Callable:
    """Make a loss known by its name; a decorator of a function as `QualityLoss` describes it."""
    if over not in KINDS:
        raise ValueError(f"over '{over}': must be one of {', '.join(KINDS)}")

    def register(function: Callable) -> Callable:
        QUALITY_LOSSES[name] = QualityLoss(over, function)
        return function

    return register


def find(name: str) -> QualityLoss:
    """The loss of this name; `UserError` where there is none."""
    if name not in QUALITY_LOSSES:
        near = difflib.get_close_matches(name, QUALITY_LOSSES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"quality loss '{name}': must be one of {', '.join(QUALITY_LOSSES)}{hint}")
    return QUALITY_LOSSES[name]


@register_quality_loss("sigmoid")
def sigmoid(good: Tensor, mask: Tensor) -> Tensor:
    """g: closes the gates, all tokens alike."""
    return good


@register_quality_loss("mse")
def mse(good: Tensor, mask: Tensor) -> Tensor:
    """g^2: closes the gates, open ones more."""
    return good.square()


@register_quality_loss("beta_moment_matching", over="moments")
def beta_moment_matching(mean: Tensor, var: Tensor, options: QualityOptions) -> dict[str, Tensor]:
    """w_mean (m - target mean)^2 + w_var (v - target variance)^2."""
    return {
        "mean": options.w_mean * (mean - options.beta_target_mean).square(),
        "variance": options.w_var * (var - options.beta_target_var).square(),
    }


@register_quality_loss("mean_variance_regularization", over="moments")
def mean_variance_regularization(mean: Tensor, var: Tensor, options: QualityOptions) -> dict[str, Tensor]:
    """(m - 1/2)^2 - lambda_var v: gates open to one half on average, and apart from each other."""
    return {"mean": (mean - 0.5).square(), "variance": -options.lambda_var * var}


@register_quality_loss("contrastive", over="pairs")
def contrastive(clean: Tensor, corrupted: Tensor) -> Tensor:
    """Binary cross-entropy of telling samples from their corrupted copies by their mean score."""
    return (F.softplus(-clean) + F.softplus(corrupted)) / 2


@register_quality_loss("ranking", over="pairs")
def ranking(clean: Tensor, corrupted: Tensor) -> Tensor:
    """-log sigmoid(clean - corrupted): a sample is to score above its own copy (Bradley & Terry, 1952)."""
    return F.softplus(corrupted - clean)


@register_quality_loss("loss_aware", over="losses")
def loss_aware(scores: Tensor, surprise: Tensor) -> Tensor:
    """(score / `SPREAD` + surprise)^2: the better the model predicts a sample, the higher it is to score.

    Its mean is 1 where the scores are all 0, and of the best linear predictor the share of the variance of the model's
    losses that scores leave unexplained.
    """
    return (scores / SPREAD + surprise).square()


def token_sums(scores: Sequence[Tensor], mask: Tensor | None, loss: QualityLoss) -> Tensor:
    """Sum of a token loss over the tokens where mask [B, S] is true (None: all), mean over layers; a scalar.

    scores: per layer [B, S, 1], before the sigmoid.
    """
    mask = _mask(scores, mask)
    sums = []
    for score in scores:
        losses = loss.function(torch.sigmoid(score.squeeze(-1)), mask)
        if losses.shape != mask.shape:
            raise UserError(f"a token loss must have the shape {tuple(mask.shape)}, not {tuple(losses.shape)}")
        sums.append(losses.masked_fill(~mask, 0.0).sum())
    return torch.stack(sums).mean()


def power_sums(scores: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Sums of g and of g^2 over the tokens where mask is true, for each layer: [L, 2], float64."""
    mask = _mask(scores, mask)
    good = torch.stack([torch.sigmoid(score.squeeze(-1))[mask] for score in scores]).double()
    return torch.stack([good.sum(-1), good.square().sum(-1)], -1)


def moment_terms(powers: Tensor, loss: QualityLoss, options: QualityOptions) -> dict[str, Tensor]:
    """Terms of a moment loss, each the mean over layers, from the means of g and g^2 over tokens: powers [L, 2].

    The variance is that of the tokens themselves, E[g^2] - m^2.
    """
    mean, square = powers.unbind(-1)
    terms = loss.function(mean, square - mean.square(), options)
    return {name: term.mean() for name, term in terms.items()}


def sample_scores(scores: Sequence[Tensor], samples: Tensor, count: int) -> Tensor:
    """Mean score of each sample over its tokens and over layers: [count].

    samples [B, S] int64: which sample a token belongs to, -1 for none.
    """
    flat = torch.stack([score.squeeze(-1) for score in scores]).mean(0).reshape(-1)
    owner = samples.reshape(-1)
    inside = owner >= 0
    sums = flat.new_zeros(count).index_add(0, owner[inside], flat[inside])
    tokens = torch.bincount(owner[inside], minlength=count).clamp_min(1)
    return sums / tokens


def batch_loss(
    name: str, scores: Sequence[Tensor], mask: Tensor | None, options: QualityOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch, a scalar, and its terms; mask [B, S] is 0 where padding. Not for losses over pairs, nor
    over the model's own losses."""
    loss = find(name)
    mask = _mask(scores, mask)
    tokens = mask.sum().clamp_min(1)
    if loss.over == "tokens":
        total = token_sums(scores, mask, loss) / tokens
        return total, {name: total}
    if loss.over == "pairs":
        raise UserError(f"quality loss '{name}': compares samples with corrupted copies, which mode=router makes")
    if loss.over == "losses":
        raise UserError(f"quality loss '{name}': needs the model's own loss on each sample, which mode=router measures")
    terms = moment_terms(power_sums(scores, mask) / tokens, loss, options)
    return sum(terms.values()), terms


def describe(name: str, powers: Tensor, terms: dict[str, Tensor]) -> str:
    """A line with a loss's terms and the gates' mean and standard deviation, from means of g and g^2: powers [L, 2]."""
    mean, square = powers.detach().double().unbind(-1)
    spread = (square - mean.square()).clamp_min(0).sqrt()
    values = {term: float(value.detach()) for term, value in terms.items()}
    parts = ", ".join(f"{term} {value:.4g}" for term, value in values.items())
    return (
        f"quality loss {name}: {sum(values.values()):.4g} ({parts}); gates: mean {float(mean.mean()):.4f}, "
        f"standard deviation {float(spread.mean()):.4f}"
    )


def _mask(scores: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    if not scores:
        raise ValueError("the model has no gates")
    shape = scores[0].shape[:-1]
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=scores[0].device)
    return mask.bool().expand(shape)
