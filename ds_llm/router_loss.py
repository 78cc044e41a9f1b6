"""The loss of training the gates of a Select-MoE model: the language model's, plus the load-balancing loss times its
weight, plus the quality loss (`ds_llm.models.quality_loss`) times its own.

Means, moments and pairs of the quality loss are those of the global batch, over all processes and micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ds_llm import engine as processes
from ds_llm.models import adapters, quality_loss
from ds_llm.models.head import IGNORE_INDEX, run_backbone
from ds_llm.models.quality_gate import record_scores
from ds_llm.modes import count_processed
from ds_llm.progress import console


@dataclass
class Totals:
    """Of the global batch of a step: what its losses count, its tokens, its pairs, its micro-batches, and where the
    loss asks for moments, the means of g and g^2 over its tokens [L, 2]."""

    valid: float
    tokens: float
    pairs: float
    parts: int
    powers: Tensor | None = None


class RouterLoss(nn.Module):
    """The loss of stage 1: `inner`'s, which has the language model's and the load-balancing loss, and the quality loss.

    The trainer averages auxiliary losses over the micro-batches of the global batch, so a micro-batch gives its share
    of the quality loss times their number.
    """

    def __init__(self, inner: nn.Module, model: nn.Module):
        super().__init__()
        self.inner = inner
        settings = adapters.without_wrapper(model).config
        self.name, self.weight = settings.quality_loss_type, settings.quality_loss_weight
        self.debug, self.options = settings.quality_loss_debug, settings.quality_options()
        self.loss = quality_loss.find(self.name)
        self.totals: Totals | None = None

    @torch.no_grad()
    def begin_step(self, engine, batches: Sequence[dict[str, Tensor]], valid: float) -> None:
        """Find out what the loss needs of the global batch; see `ds_llm.modes.Job`.

        A loss over moments is no sum over tokens. One more forward pass gives the moments, and the gradient of the loss
        with respect to them makes it one.
        """
        tokens = sum(map(count_processed, batches))
        pairs = sum(int(batch["documents"].max()) + 1 for batch in batches) if self.loss.over == "pairs" else 0
        powers = None
        if self.loss.over == "moments":
            powers = sum(engine.forward(powers=True, **batch) for batch in batches)
        found = processes.all_reduce([tokens, pairs, *([] if powers is None else powers.flatten().tolist())])
        tokens, pairs, parts = max(found[0], 1), max(found[1], 1), len(batches) * engine.world_size
        if powers is not None:
            powers = torch.tensor(found[2:], dtype=torch.float64, device=powers.device).view(powers.shape) / tokens
            if self.debug:
                terms = quality_loss.moment_terms(powers, self.loss, self.options)
                console.print(quality_loss.describe(self.name, powers, terms), markup=False)
        self.totals = Totals(valid, tokens, pairs, parts, powers)

    def forward(
        self,
        corrupted_ids: Tensor | None = None,
        documents: Tensor | None = None,
        powers: bool = False,
        **batch,
    ):
        """(loss_sum, auxiliary losses, report, counts, sums) of a training batch, see `ds_llm.modes.Job`.

        In evaluation, of a batch with corrupted_ids, [4] summed over its pairs: loss (the contrastive one where this is
        none over pairs), g of samples, g of copies, how many samples score above theirs; of another, what `inner`
        gives. powers: only the sums of g and g^2 [L, 2].
        """
        if not self.training and corrupted_ids is None:
            return self.inner(**batch)
        if powers:
            return quality_loss.power_sums(self._scores(batch["input_ids"], batch), _mask(batch))
        if not self.training:
            clean, copies = (self._scores(ids, batch) for ids in (batch["input_ids"], corrupted_ids))
            return self._pair_sums(clean, copies, documents)
        totals = self.totals
        with record_scores() as scores:
            loss_sum, aux, report, counts = self.inner(**_with_copies(batch, corrupted_ids))
        rows = len(batch["input_ids"])
        scores, copies = [score[:rows] for score in scores], [score[rows:] for score in scores]
        sums = quality_loss.power_sums(scores, _mask(batch))
        gate_mean = sums[:, 0].mean().detach() / totals.tokens
        figures = [gate_mean]
        if self.loss.over == "tokens":
            share = quality_loss.token_sums(scores, _mask(batch), self.loss) / totals.tokens
            value = share.detach()
        elif self.loss.over == "moments":
            share, value = self._linearised(sums)
        else:
            found = self._pair_sums(scores, copies, documents) / totals.pairs
            share, value = found[0], found[0].detach()
            figures += [found[2].detach(), found[3].detach()]
        if self.debug and self.loss.over != "moments":
            here = value * totals.parts
            line = quality_loss.describe(self.name, sums.detach() / count_processed(batch), {"this micro-batch": here})
            console.print(line, markup=False)
        extra = aux + (totals.parts * self.weight * share).to(aux.dtype)
        return loss_sum, extra, report, counts, torch.stack([value.double(), *figures]) * totals.valid

    def _linearised(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the gradient of a loss over moments, as something whose gradient it is, and its
        share of the loss."""
        totals = self.totals
        powers = totals.powers.clone().requires_grad_()
        with torch.enable_grad():
            total = sum(quality_loss.moment_terms(powers, self.loss, self.options).values())
            (slope,) = torch.autograd.grad(total, powers)
        return (slope * sums).sum() / totals.tokens, total.detach() / totals.parts

    def _pair_sums(self, clean: Sequence[Tensor], copies: Sequence[Tensor], documents: Tensor) -> Tensor:
        count = int(documents.max()) + 1
        means = [quality_loss.sample_scores(scores, documents, count) for scores in (clean, copies)]
        gates = [
            quality_loss.sample_scores([torch.sigmoid(score) for score in scores], documents, count).sum()
            for scores in (clean, copies)
        ]
        above = (means[0] > means[1]).sum()
        loss = self.loss if self.loss.over == "pairs" else quality_loss.find("contrastive")
        return torch.stack([x.double() for x in (loss.function(*means).sum(), *gates, above)])

    def _scores(self, ids: Tensor, batch: dict[str, Tensor]) -> list[Tensor]:
        """The gates' scores of these tokens in the place of the batch's, without the output head."""
        names = ("position_ids", "attention_mask", "token_mask")
        with record_scores() as scores:
            run_backbone(self.inner.model, ids, **{name: batch[name] for name in names if name in batch})
        return scores


def _with_copies(batch: dict[str, Tensor], corrupted_ids: Tensor | None) -> dict[str, Tensor]:
    """The batch, and below its rows those of the copies, which carry no loss of the language model.

    They go through the model together: ZeRO-3 takes the gradients of a block of experts once per backward pass.
    """
    if corrupted_ids is None:
        return batch
    other = {"input_ids": corrupted_ids, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)}
    return {name: torch.cat([value, other.get(name, value)]) for name, value in batch.items()}


def _mask(batch: dict[str, Tensor]) -> Tensor | None:
    return batch.get("attention_mask", batch.get("token_mask"))
