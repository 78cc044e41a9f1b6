"""Preference optimisation on single answers that are desirable or not: KTO, Ethayarajh et al. 2024 (arXiv:2402.01306).

With r = log pi(y|x) - log ref(y|x) of an answer, z the reference point and w the weight of its label (equation 7):

    desirable     w_d (1 - sigmoid(beta (r - z)))
    undesirable   w_u (1 - sigmoid(beta (z - r)))

z = max(0, mean of log pi(y'|x) - log ref(y'|x)) over mismatched answers y' estimates the KL divergence from the
reference; it has no gradient. Here the mean is over the whole global batch, so the loss does not depend on how that is
split.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ds_llm.config.mode_sections import KtoConfig
from ds_llm.config.modes import MODES
from ds_llm.config.run import Config
from ds_llm.data.labelled import LabelledAnswers, prepare_labelled
from ds_llm.engine.engine import Engine
from ds_llm.errors import ConfigError
from ds_llm.progress import console
from ds_llm.train import alignment
from ds_llm.train.evaluation import measure
from ds_llm.train.job import Figures, Job, Shown
from ds_llm.train.start_model import start_model
from ds_llm.train.step import MicroStep

METRICS = (
    "reward_desirable",
    "reward_undesirable",
    "margin",
    "accuracy",
    "kl",
    "logp_desirable",
    "logp_undesirable",
)
MOST_DESIRABLE = 4 / 3  # weight of all desirable answers over that of all others; the paper recommends 1 to this


@dataclass
class Data:
    """Prepared and checked inputs of a run."""

    train: Samples
    val: Samples | None
    tokenizer: object
    seq_len: int
    fingerprint: dict


class Samples:
    """Labelled answers with their log-probabilities under the reference model, once those are known.

    `reference` is float32 [answers, columns] in nats: of the answer and, with kl, of the mismatched one in its place;
    see `ds_llm.train.alignment.Scored`.
    """

    def __init__(self, answers: LabelledAnswers, kl: bool, seed: int):
        self.answers, self.reference = answers, None
        self.partners = answers.partners(seed) if kl else None
        self.columns = 2 if kl else 1
        self.fingerprint = {"answers": answers.fingerprint}
        if kl:
            pairing = hashlib.sha256(self.partners.tobytes()).hexdigest()
            self.fingerprint |= {"mismatched": pairing, "max_length": answers.max_length}

    def __len__(self) -> int:
        return len(self.answers)

    def batch(self, indices) -> dict[str, Tensor]:
        """The arguments of `KtoObjective` for these answers."""
        indices = np.asarray(indices, np.int64)
        extra = {"index": indices, "desirable": self.answers.desirable[indices]}
        if self.reference is not None:
            extra["reference"] = self.reference[indices, 0]
        return self.answers.batch(indices) | {name: torch.from_numpy(array) for name, array in extra.items()}

    def scored(self, indices) -> list[dict[str, Tensor]]:
        """The answers and, with kl, the mismatched ones: two batches of the shapes that training has."""
        if self.partners is None:
            return [self.answers.batch(indices)]
        return [self.answers.batch(indices), self.answers.mismatched(indices, self.partners)]


def check(config: Config) -> Data:
    """Tokenise the answers (once: they are cached); finds every mistake before a model is built.

    Answers and reference log-probabilities are stored in `alignment.cache()`.
    """
    options = config.kto
    alignment.check_keys(config, "data/answers.jsonl")
    if not options.desirable_weight and not options.undesirable_weight:
        raise ConfigError("kto.desirable_weight: 0, as kto.undesirable_weight is, leaves nothing to learn")
    samples = partial(Samples, kl=options.kl, seed=config.train.seed)
    found = alignment.prepare(config, prepare_labelled, samples, options.reference)
    answers = found.train.answers
    _check_balance(options, answers)
    labels = hashlib.sha256(answers.desirable.tobytes()).hexdigest()
    fingerprint = {"answers": answers.fingerprint, "labels": labels, "seq_len": found.seq_len, **found.start}
    return Data(found.train, found.val, found.tokenizer, found.seq_len, fingerprint)


def _check_balance(options: KtoConfig, answers: LabelledAnswers) -> None:
    """Say in a line where one kind of answers outweighs the other by more than the paper recommends."""
    counts = answers.report.desirable, answers.report.undesirable
    if not all(counts):
        kind = "desirable" if counts[0] else "undesirable"
        console.print(f"warning: all {sum(counts):,} training answers are {kind}; KTO learns from both kinds")
        return
    good, bad = options.desirable_weight * counts[0], options.undesirable_weight * counts[1]
    if not bad <= good <= MOST_DESIRABLE * bad:
        low, high = bad / counts[0], MOST_DESIRABLE * bad / counts[0]
        advice = f"set kto.desirable_weight between {low:.3g} and {high:.3g}" if bad else "raise kto.undesirable_weight"
        console.print(
            f"warning: desirable answers weigh {good:,.4g} in all, undesirable ones {bad:,.4g}; KTO recommends 1:1 to "
            f"4:3, so {advice}"
        )


def figures(config: Config) -> Figures:
    """Names of the figures that this mode adds to the records of evaluations and steps."""
    return Figures(("loss", *METRICS), METRICS)


def shown(data: Data) -> Shown:
    """The answers as `prepare.py show` prints them."""
    answers = data.train.answers

    def parts(i: int) -> list:
        label = "desirable" if answers.desirable[i] else "undesirable"
        return [(f"answer {i}, {label}", *answers.sequence(i))]

    return Shown(len(answers), parts, answers.describe())


def build(config: Config, data: Data) -> Job:
    """Load the model, with adapters where asked, and join it with the answers."""
    from ds_llm.evaluation.samples import sampling

    model = start_model(config, data.tokenizer)
    objective = KtoObjective(model, config.kto)
    return Job(
        model,
        objective,
        data.tokenizer,
        data.train,
        data.seq_len,
        _evaluation(config, data.val) if data.val is not None else None,
        sampling(config, data.tokenizer, model, chat=True),
        prepare=alignment.reference_pass(
            config,
            config.kto.reference,
            model,
            data.tokenizer,
            lambda reference: KtoObjective(reference, config.kto),
            data.train,
            data.val,
        ),
        begin_step=lambda engine, batches, valid: objective.begin_step(engine, data.train, batches, valid),
        count=lambda batch: len(batch["index"]),
        unit="answer",
        metrics=METRICS,
        goal=MODES["kto"].goal,
    )


@dataclass(frozen=True)
class Whole:
    """Figures over all answers of the global batch that the loss needs.

    kl: the reference point z_0 of the paper, in nats. The trainer divides summed losses by the number of all answers.
    Multiplied by `per_desirable`, such a quotient becomes the mean over desirable answers; `per_undesirable` does the
    same for the others. NaN if the batch has no answer of that kind.
    """

    kl: float
    per_desirable: float
    per_undesirable: float

    @classmethod
    def of(cls, answers: float, desirable: float, mismatched_sum: float) -> Whole:
        """From counts. mismatched_sum: the sum of log pi - log ref over the mismatched answers, one for each answer."""
        kl = max(mismatched_sum / answers, 0.0)  # NaN stays NaN
        undesirable = answers - desirable
        return cls(
            kl,
            answers / desirable if desirable else math.nan,
            answers / undesirable if undesirable else math.nan,
        )


def kto(
    options: KtoConfig, policy: Tensor, reference: Tensor, desirable: Tensor, whole: Whole
) -> tuple[Tensor, Tensor]:
    """Loss summed over B answers (scalar), and sums that give `METRICS`, detached [7].

    policy, reference: summed log-probabilities in nats [B]; desirable: bool [B]. Divided by the number of answers of
    the global batch the sums are the same for every split of it.
    """
    ratios = policy - reference
    ahead = torch.where(desirable, ratios - whole.kl, whole.kl - ratios)
    good, bad = desirable.to(ratios.dtype), (~desirable).to(ratios.dtype)
    weights = options.desirable_weight * good + options.undesirable_weight * bad
    losses = weights * torch.sigmoid(-options.beta * ahead)
    with torch.no_grad():
        good, bad = good * whole.per_desirable, bad * whole.per_undesirable
        rewards = options.beta * ratios
        # a tie is half a success, so that a model equal to its reference is at chance and not at 0
        success = (ahead > 0).to(ratios.dtype) + 0.5 * (ahead == 0)
        means = (rewards * good, rewards * bad, rewards * (good - bad), success, torch.full_like(ratios, whole.kl))
        sums = torch.stack([value.sum() for value in (*means, policy * good, policy * bad)])
    return losses.sum(), sums


class KtoObjective(nn.Module):
    """The KTO loss of a causal language model on B answers."""

    def __init__(self, model: nn.Module, options: KtoConfig):
        super().__init__()
        self.model, self.options = model, options
        self.whole: Whole | None = None

    @torch.no_grad()
    def begin_step(self, engine: Engine, samples: Samples, batches: list[dict[str, Tensor]], valid: float) -> None:
        """Estimate the reference point on the whole global batch, before its weights change; see `Job.begin_step`."""
        differences = torch.zeros((), dtype=torch.float64)
        if samples.partners is not None:
            engine.train(False)  # without dropout, as the reference
            for batch in batches:
                index = batch["index"].numpy()
                found = engine.forward(**samples.answers.mismatched(index, samples.partners), log_probs=True)
                reference = torch.from_numpy(samples.reference[index, 1])
                differences = differences + (found.double() - reference.to(found.device)).sum()
            engine.train()
        desirable = sum(int(batch["desirable"].sum()) for batch in batches)
        found, desirable = engine.total([float(differences), desirable])
        self.whole = Whole.of(valid, desirable, found)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor,
        index: Tensor | None = None,
        desirable: Tensor | None = None,
        reference: Tensor | None = None,
        log_probs: bool = False,
    ) -> MicroStep | Tensor:
        """The loss of a micro-batch and sums of METRICS, see `kto` and `ds_llm.models.head.LMLoss`; with `log_probs`
        only the summed log-probabilities of the answers [B].

        input_ids, labels (already shifted, -100 outside the answers), attention_mask: [B, S]; index, desirable (bool),
        reference: [B].
        """
        from ds_llm.models.head import lm_loss

        found = lm_loss(self.model, input_ids, labels, attention_mask=attention_mask, per_row=True)
        policy = -found.loss_sum
        if log_probs:
            return policy
        loss_sum, sums = kto(self.options, policy, reference, desirable, self.whole)
        return MicroStep(loss_sum, found.aux_loss, found.aux_report, found.expert_counts, sums)


def _evaluation(config: Config, val: Samples):
    batches = alignment.eval_batches(config, val)
    order = np.concatenate(batches)
    size, count = len(batches[0]), len(order)

    @torch.no_grad()
    def evaluate(engine: Engine) -> dict:
        """Mean loss and figures of the held-out answers, with the reference point estimated on all of them."""
        start = time.perf_counter()

        def log_probs(indices) -> np.ndarray:
            found = np.zeros((val.columns, size))
            for column, batch in enumerate(val.scored(indices)):
                found[column, : len(indices)] = engine.forward(**batch, log_probs=True).double().cpu().numpy()
            return found.ravel()

        table = measure(engine, batches, log_probs, val.columns * size).reshape(len(batches), val.columns, size)
        policy = torch.from_numpy(table.transpose(1, 0, 2).reshape(val.columns, -1)[:, :count])
        reference = torch.from_numpy(val.reference[order].T).double()
        desirable = torch.from_numpy(val.answers.desirable[order])
        mismatched = float((policy[1] - reference[1]).sum()) if val.columns > 1 else 0.0
        whole = Whole.of(count, int(desirable.sum()), mismatched)
        loss_sum, sums = kto(config.kto, policy[0], reference[0], desirable, whole)
        return {
            **dict(zip(("loss", *METRICS), (float(loss_sum) / count, *(sums / count).tolist()), strict=True)),
            "answers": count,
            "seconds": time.perf_counter() - start,
        }

    return evaluate
