"""Preference optimisation on pairs of a chosen and a rejected answer: DPO, IPO, SLiC's hinge, SimPO and ORPO."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ds_llm.config.modes import MODES
from ds_llm.config.run import Config
from ds_llm.data.pairs import Pairs, prepare_pairs
from ds_llm.errors import ConfigError
from ds_llm.train import alignment
from ds_llm.train.evaluation import measure
from ds_llm.train.job import Figures, Job, Shown
from ds_llm.train.losses.preference import METRICS, Preference
from ds_llm.train.start_model import start_model
from ds_llm.train.step import MicroStep


@dataclass
class Data:
    """Prepared and checked inputs of a run."""

    loss: Preference
    train: Samples
    val: Samples | None
    tokenizer: object
    seq_len: int
    fingerprint: dict


class Samples:
    """Preference pairs with their log-probabilities under the reference model, once those are known.

    `reference` is float32 [pairs, 2] in nats, chosen and rejected, of the pairs that the run uses, or None for losses
    without a reference; see `ds_llm.train.alignment.Scored`.
    """

    columns = 2

    def __init__(self, pairs: Pairs):
        self.pairs, self.reference = pairs, None
        self.fingerprint = {"pairs": pairs.fingerprint}

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices) -> dict[str, Tensor]:
        """The arguments of `PreferenceObjective` for these pairs."""
        batch = self.pairs.batch(indices)
        if self.reference is not None:
            batch["reference"] = torch.from_numpy(np.ascontiguousarray(self.reference[np.asarray(indices)].T))
        return batch

    def scored(self, indices) -> list[dict[str, Tensor]]:
        """Both answers of each pair in one batch, the chosen ones first."""
        return [self.pairs.batch(indices)]


def check(config: Config) -> Data:
    """Tokenise the pairs (once: they are cached) and check the loss; finds every mistake before a model is built.

    Pairs and reference log-probabilities are stored in `alignment.cache()`.
    """
    options = config.dpo
    alignment.check_keys(config, "data/pairs.jsonl")
    loss = Preference(
        options.loss,
        options.beta,
        options.label_smoothing,
        options.reduction,
        options.sft_weight,
        options.simpo_gamma,
    )
    if options.reference and not loss.needs_reference:
        raise ConfigError(f"dpo.reference: the {options.loss} loss has no reference; leave it out")
    found = alignment.prepare(config, prepare_pairs, Samples, options.reference, loss.needs_reference)
    fingerprint = {"pairs": found.train.pairs.fingerprint, "seq_len": found.seq_len, **found.start}
    return Data(loss, found.train, found.val, found.tokenizer, found.seq_len, fingerprint)


def figures(config: Config) -> Figures:
    """Names of the figures that this mode adds to the records of evaluations and steps."""
    return Figures(("loss", *METRICS), METRICS)


def shown(data: Data) -> Shown:
    """The pairs as `prepare.py show` prints them."""
    pairs = data.train.pairs

    def parts(i: int) -> list:
        return [(f"pair {i}, {name}", *sequence) for name, sequence in pairs.pair(i)._asdict().items()]

    return Shown(len(pairs), parts, pairs.describe())


def build(config: Config, data: Data) -> Job:
    """Load the model, with adapters where asked, and join it with the pairs."""
    from ds_llm.evaluation.samples import sampling

    model = start_model(config, data.tokenizer)
    prepare = None
    if data.loss.needs_reference:
        prepare = alignment.reference_pass(
            config,
            config.dpo.reference,
            model,
            data.tokenizer,
            lambda reference: PreferenceObjective(reference, None),
            data.train,
            data.val,
        )

    return Job(
        model,
        PreferenceObjective(model, data.loss),
        data.tokenizer,
        data.train,
        data.seq_len,
        _evaluation(config, data.val) if data.val is not None else None,
        sampling(config, data.tokenizer, model, chat=True),
        prepare=prepare,
        count=lambda batch: len(batch["index"]),
        unit="pair",
        metrics=METRICS,
        goal=MODES["dpo"].goal,
    )


class PreferenceObjective(nn.Module):
    """A preference loss of a causal language model on P pairs, whose rows are the P chosen, then the P rejected."""

    def __init__(self, model: nn.Module, loss: Preference | None):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor,
        index: Tensor,
        reference: Tensor | None = None,
        log_probs: bool = False,
    ) -> MicroStep | Tensor:
        """The loss of a micro-batch and sums of METRICS, see `Preference` and `ds_llm.models.head.LMLoss`; with
        `log_probs` only the summed log-probabilities of the answers [2P].

        input_ids, labels (already shifted, -100 outside the answers), attention_mask: [2P, S]; index [P]; reference
        [2, P]. Both answers of a pair go through the model in one forward pass.
        """
        from ds_llm.models.head import lm_loss

        found = lm_loss(self.model, input_ids, labels, attention_mask=attention_mask, per_row=True)
        if log_probs:
            return -found.loss_sum
        policy = -found.loss_sum.view(2, -1)
        lengths = (labels != -100).sum(-1).view(2, -1)
        loss_sum, sums = self.loss(policy, reference, lengths)
        return MicroStep(loss_sum, found.aux_loss, found.aux_report, found.expert_counts, sums)


def _evaluation(config: Config, val: Samples):
    batches = alignment.eval_batches(config, val)
    count = sum(map(len, batches))

    @torch.no_grad()
    def evaluate(engine) -> dict:
        """Mean loss and figures of the held-out pairs."""
        start = time.perf_counter()

        def sums(pairs) -> list[float]:
            found = engine.forward(**val.batch(pairs))
            return [float(found.loss_sum), *found.figures.double().tolist()]

        table = measure(engine, batches, sums, 1 + len(METRICS))
        means = [math.fsum(column) / count for column in table.T]
        return {
            **dict(zip(("loss", *METRICS), means, strict=True)),
            "pairs": count,
            "seconds": time.perf_counter() - start,
        }

    return evaluate
