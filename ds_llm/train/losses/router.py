"""The loss for training the gates of a Select-MoE model: language-model loss + weight * load-balancing loss
+ weight * quality loss (`ds_llm.models.quality_loss`).

Means, moments, pairs and samples of the quality loss are those of the global batch, over all processes and
micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ds_llm.compat.peft import without_wrapper
from ds_llm.data.batches import count_processed
from ds_llm.data.corrupt import document_numbers
from ds_llm.engine import processes
from ds_llm.errors import UserError
from ds_llm.models import quality_loss
from ds_llm.models.head import IGNORE_INDEX, head_loss
from ds_llm.models.isolation import run_backbone
from ds_llm.models.quality_gate import open_gates, record_scores
from ds_llm.progress import console
from ds_llm.train.step import MicroStep


@dataclass
class Totals:
    """Figures of a step's global batch: counted units, tokens, documents (for losses over pairs or over the model's own
    losses), micro-batches, and for losses over moments the means of g and g^2 over its tokens [L, 2]."""

    valid: float
    tokens: float
    documents: float
    parts: int
    powers: Tensor | None = None


class RouterLoss(nn.Module):
    """The loss of stage 1: the losses of `inner` (language model and load balancing) and the quality loss.

    The trainer averages auxiliary losses over the micro-batches of the global batch, so each micro-batch returns its
    share of the quality loss times their number.
    """

    def __init__(self, inner: nn.Module, model: nn.Module):
        super().__init__()
        self.inner = inner
        settings = without_wrapper(model).config
        self.name, self.weight = settings.quality_loss_type, settings.quality_loss_weight
        self.debug, self.options = settings.quality_loss_debug, settings.quality_options()
        self.loss = quality_loss.find(self.name)
        self.totals: Totals | None = None

    @torch.no_grad()
    def begin_step(self, engine, batches: Sequence[dict[str, Tensor]], valid: float) -> None:
        """Compute the loss's statistics of the global batch; see `ds_llm.train.job.Job`.

        A loss over moments is not a sum over tokens. An additional forward pass gives the moments; the loss is then
        linearised by its gradient with respect to them. For a loss over the model's own losses, an additional pass
        gives those, and each of `batches` gets `documents` (see `supervised_documents`) and their `surprise`.
        """
        tokens = sum(map(count_processed, batches))
        powers = None
        if self.loss.over == "losses":
            self._add_surprise(engine, batches)
        documents = sum(count_documents(batch) for batch in batches)
        if self.loss.over == "moments":
            powers = sum(engine.forward(powers=True, **batch) for batch in batches)
        found = processes.all_reduce([tokens, documents, *([] if powers is None else powers.flatten().tolist())])
        tokens, documents, parts = max(found[0], 1), max(found[1], 1), len(batches) * engine.world_size
        if powers is not None:
            powers = torch.tensor(found[2:], dtype=torch.float64, device=powers.device).view(powers.shape) / tokens
            if self.debug:
                terms = quality_loss.moment_terms(powers, self.loss, self.options)
                console.print(quality_loss.describe(self.name, powers, terms))
        self.totals = Totals(valid, tokens, documents, parts, powers)

    def _add_surprise(self, engine, batches: Sequence[dict[str, Tensor]]) -> None:
        for batch in batches:
            batch["documents"] = supervised_documents(batch)
        losses = [engine.forward(own_losses=True, **batch) for batch in batches]
        count, mean, deviation = moments(losses)
        if count < 2:
            raise UserError(
                f"router.quality_loss: {self.name} compares the documents of a global batch, and this one holds "
                f"{count:.0f} that can be; raise train.batch_size or train.accumulation_steps"
            )
        for batch, values in zip(batches, losses, strict=True):
            batch["surprise"] = (values - mean) / deviation

    def forward(
        self,
        corrupted_ids: Tensor | None = None,
        documents: Tensor | None = None,
        surprise: Tensor | None = None,
        powers: bool = False,
        own_losses: bool = False,
        **batch,
    ) -> MicroStep | Tensor:
        """The loss of a micro-batch with its metric sums, or statistics of the micro-batch.

        In training it returns a `MicroStep`, whose sums belong to the mode's `Job.metrics`. With `powers` it returns
        the sums of g and g^2 over the tokens [L, 2], g being the gate scores. With `own_losses` it returns, for each of
        the N documents that `documents` [B, S] numbers, the mean cross-entropy per label with all gates open [N].

        In evaluation there are three cases. A batch with `corrupted_ids` gives sums over its pairs [4]: the loss (the
        contrastive one if the loss is not over pairs), g of the samples, g of the copies, and the number of samples
        that score above their copies. With `own_losses` the documents' mean scores come first [2, N]. Any other batch
        gives what `inner` gives.
        """
        if own_losses:
            losses = self._losses(documents, batch)
            if self.training:
                return losses
            scores = quality_loss.sample_scores(self._scores(batch["input_ids"], batch), documents, len(losses))
            return torch.stack([scores, losses.to(scores.dtype)])
        if not self.training and corrupted_ids is None:
            return self.inner(**batch)
        if powers:
            return quality_loss.power_sums(self._scores(batch["input_ids"], batch), _mask(batch))
        if not self.training:
            clean, copies = (self._scores(ids, batch) for ids in (batch["input_ids"], corrupted_ids))
            return self._pair_sums(clean, copies, documents)
        totals = self.totals
        with record_scores() as scores:
            found: MicroStep = self.inner(**_with_copies(batch, corrupted_ids))
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
        elif self.loss.over == "losses":
            means = quality_loss.sample_scores(scores, documents, len(surprise))
            share = self.loss.function(means, surprise).sum() / totals.documents
            value = share.detach()
        else:
            loss, _, gate_of_copies, above = self._pair_sums(scores, copies, documents) / totals.documents
            share, value = loss, loss.detach()
            figures += [gate_of_copies.detach(), above.detach()]
        if self.debug and self.loss.over != "moments":
            here = value * totals.parts
            line = quality_loss.describe(self.name, sums.detach() / count_processed(batch), {"this micro-batch": here})
            console.print(line)
        aux = found.aux_loss + (totals.parts * self.weight * share).to(found.aux_loss.dtype)
        return found._replace(aux_loss=aux, figures=torch.stack([value.double(), *figures]) * totals.valid)

    def _linearised(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of a loss over moments: a scalar with the same gradient, and the value."""
        totals = self.totals
        powers = totals.powers.clone().requires_grad_()
        with torch.enable_grad():
            total = sum(quality_loss.moment_terms(powers, self.loss, self.options).values())
            (slope,) = torch.autograd.grad(total, powers)
        return (slope * sums).sum() / totals.tokens, total.detach() / totals.parts

    def _pair_sums(self, clean: Sequence[Tensor], copies: Sequence[Tensor], documents: Tensor) -> Tensor:
        count = _count(documents)
        means = [quality_loss.sample_scores(scores, documents, count) for scores in (clean, copies)]
        gates = [
            quality_loss.sample_scores([torch.sigmoid(score) for score in scores], documents, count).sum()
            for scores in (clean, copies)
        ]
        above = (means[0] > means[1]).sum()
        loss = self.loss if self.loss.over == "pairs" else quality_loss.find("contrastive")
        return torch.stack([x.double() for x in (loss.function(*means).sum(), *gates, above)])

    def _scores(self, ids: Tensor, batch: dict[str, Tensor]) -> list[Tensor]:
        """The gates' scores for `ids` in place of the batch's tokens, without the output head."""
        with record_scores() as scores:
            run_backbone(self.inner.model, ids, **_positions(batch))
        return scores

    def _losses(self, documents: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy in nats per label of each document [N], float32, of the model as it was without gates."""
        model = self.inner.model
        with open_gates(model):
            hidden = run_backbone(model, batch["input_ids"], **_positions(batch)).last_hidden_state
        labels = batch["labels"]
        losses = head_loss(model.get_output_embeddings(), hidden, labels, "none").view(labels.shape)
        inside = (labels != IGNORE_INDEX) & (documents >= 0)
        owner = documents[inside]
        sums = losses.new_zeros(_count(documents)).index_add(0, owner, losses[inside])
        return sums / torch.bincount(owner, minlength=len(sums)).clamp_min(1)


def supervised_documents(batch: dict[str, Tensor]) -> Tensor:
    """Number of each token's document in the micro-batch, int64 [B, S]; -1 for padding and documents without labels."""
    owner = document_numbers(batch)
    numbers = torch.where(owner < 0, -1, owner + torch.arange(len(owner))[:, None] * owner.shape[1])
    known = numbers[(batch["labels"] != IGNORE_INDEX) & (numbers >= 0)].unique()
    if not len(known):
        return torch.full_like(owner, -1)
    place = torch.searchsorted(known, numbers).clamp_max(len(known) - 1)
    return torch.where(known[place] == numbers, place, -1)


def count_documents(batch: dict[str, Tensor]) -> int:
    return _count(batch["documents"]) if "documents" in batch else 0


def moments(values: Sequence[Tensor]) -> tuple[float, float, float]:
    """Count, mean and standard deviation (at least 1e-6) of the values of all processes."""
    mine = torch.cat([part.double().cpu() for part in values])
    count, total = processes.all_reduce([len(mine), float(mine.sum())])
    mean = total / max(count, 1)
    (squares,) = processes.all_reduce([float((mine - mean).square().sum())])
    return count, mean, max((squares / max(count, 1)) ** 0.5, 1e-6)


def _count(documents: Tensor) -> int:
    return int(documents.max()) + 1


def _positions(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("position_ids", "attention_mask", "token_mask", "packed") if name in batch}


def _with_copies(batch: dict[str, Tensor], corrupted_ids: Tensor | None) -> dict[str, Tensor]:
    """The batch with the rows of the copies appended, which carry no language-model loss.

    One forward pass computes both, because ZeRO-3 reduces the gradients of a block of experts once per backward pass.
    """
    if corrupted_ids is None:
        return batch
    other = {"input_ids": corrupted_ids, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)}
    tensors = {name: value for name, value in batch.items() if name != "packed"}  # of half the rows
    return {name: torch.cat([value, other.get(name, value)]) for name, value in tensors.items()}


def _mask(batch: dict[str, Tensor]) -> Tensor | None:
    return batch.get("attention_mask", batch.get("token_mask"))
