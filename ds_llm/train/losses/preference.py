"""Losses of preference optimisation: pure functions of the log-probabilities of chosen and rejected answers.

With pi the policy's log-probability of an answer, ref the reference's, and d = (pi_c - ref_c) - (pi_r - ref_r):

    sigmoid   -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)   DPO, Rafailov et al. 2023 (arXiv:2305.18290);
                                                                     e: conservative DPO, Mitchell 2023
    ipo       (d - 1 / (2 beta))^2                                   Azar et al. 2023 (arXiv:2310.12036), eq. 17
    hinge     max(0, 1 - beta d)                                     SLiC, Zhao et al. 2023 (arXiv:2305.10425)
    simpo     sigmoid's form of beta (pi_c - pi_r) - gamma           Meng et al. 2024 (arXiv:2405.14734), eq. 6
    orpo      -pi_c - beta log sigmoid(log odds_c - log odds_r)      Hong et al. 2024 (arXiv:2403.07691), eq. 6-7

pi and ref are sums over the answer's tokens or, by `reduction`, their means; simpo and orpo are defined with means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_llm.errors import ConfigError

REDUCTIONS = {"sigmoid": "sum", "hinge": "sum", "ipo": "mean", "simpo": "mean", "orpo": "mean"}  # what `auto` means
LOSSES = tuple(REDUCTIONS)
REFERENCE_FREE = ("simpo", "orpo")
METRICS = ("reward_chosen", "reward_rejected", "margin", "accuracy", "logp_chosen", "logp_rejected")


@dataclass(frozen=True)
class Preference:
    """A loss and its constants, checked; calling it computes the loss of a batch of pairs.

    beta: strength of the tie to the reference (simpo: scale of the reward, orpo: weight of the odds ratio). reduction:
    sum or mean over an answer's tokens, auto for the loss's usual one. sft_weight: weight of the chosen answer's mean
    negative log-likelihood per token, None for 1 in orpo, which contains it, and 0 otherwise. Raises `ConfigError` for
    a constant the loss does not have.
    """

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    reduction: str = "auto"
    sft_weight: float | None = None
    simpo_gamma: float = 0.5

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ConfigError(f"dpo.loss: {self.loss!r} is not one of {', '.join(LOSSES)}")
        if self.label_smoothing and self.loss not in ("sigmoid", "simpo"):
            raise ConfigError(f"dpo.label_smoothing: the {self.loss} loss has none; set it to 0")
        if self.reduction == "sum" and self.loss in REFERENCE_FREE:
            raise ConfigError(f"dpo.reduction: {self.loss} is defined with means over the tokens; use auto or mean")
        if self.reduction == "auto":
            object.__setattr__(self, "reduction", REDUCTIONS[self.loss])
        if self.sft_weight is None:
            object.__setattr__(self, "sft_weight", 1.0 if self.loss == "orpo" else 0.0)

    @property
    def needs_reference(self) -> bool:
        return self.loss not in REFERENCE_FREE

    def __call__(self, policy: Tensor, reference: Tensor | None, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Loss summed over the pairs of a batch (scalar), and the sums of `METRICS` over the pairs, detached [6].

        policy, reference: summed log-probabilities in nats [2, P] of chosen (row 0) and rejected (row 1) answers;
        reference is None for simpo and orpo. lengths [2, P]: their tokens, at least 1. Divided by the number of pairs
        of the global batch the sums are the same for every split of it into micro-batches and ranks.
        """
        means = policy / lengths
        scores = means if self.reduction == "mean" else policy
        if self.needs_reference:
            scores = scores - (reference / lengths if self.reduction == "mean" else reference)
        losses = self._losses(scores[0] - scores[1], means)
        if self.sft_weight:
            losses = losses - self.sft_weight * means[0]
        with torch.no_grad():
            rewards = self.beta * scores
            margins = rewards[0] - rewards[1]
            # a tie is half a success, so that a model equal to its reference is at chance and not at 0
            accuracy = (margins > 0).to(margins.dtype) + 0.5 * (margins == 0)
            sums = torch.stack([v.sum() for v in (*rewards, margins, accuracy, *policy)])
        return losses.sum(), sums

    def _losses(self, difference: Tensor, means: Tensor) -> Tensor:
        if self.loss == "ipo":
            return (difference - 1 / (2 * self.beta)).square()
        if self.loss == "hinge":
            return F.relu(1 - self.beta * difference)
        if self.loss == "orpo":
            odds = means - log1mexp(means)
            return -self.beta * F.logsigmoid(odds[0] - odds[1])
        logits = self.beta * difference - (self.simpo_gamma if self.loss == "simpo" else 0)
        smooth = self.label_smoothing
        return -(1 - smooth) * F.logsigmoid(logits) - (smooth * F.logsigmoid(-logits) if smooth else 0)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0 without loss of digits near 0 or far from it (Maechler 2012); finite at 0."""
    x = x.clamp_max(-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)
    # both branches get arguments they can take, or the gradient of the unused one would be NaN
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    )
