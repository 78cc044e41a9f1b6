"""Preference optimisation on pairs of a chosen and a rejected answer: DPO, IPO, SLiC's hinge, SimPO and ORPO."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ds_llm.compat.peft import is_adapter
from ds_llm.config.modes import MODES
from ds_llm.config.run import Config
from ds_llm.data.corpora import cache_folder
from ds_llm.data.order import SampleOrder
from ds_llm.data.pairs import Pairs, prepare_pairs
from ds_llm.engine import processes
from ds_llm.engine.inference import inference
from ds_llm.errors import ConfigError, UserError
from ds_llm.pretrained import lora as adapters
from ds_llm.pretrained.fingerprint import identity, model_fingerprint
from ds_llm.pretrained.lengths import lengths
from ds_llm.train.evaluation import measure
from ds_llm.train.job import Figures, Job, Shown
from ds_llm.train.losses.preference import METRICS, Preference
from ds_llm.train.reference import reference_log_probs
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
    without a reference.
    """

    def __init__(self, pairs: Pairs):
        self.pairs, self.reference = pairs, None

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices) -> dict[str, Tensor]:
        """The arguments of `PreferenceObjective` for these pairs."""
        batch = self.pairs.batch(indices)
        if self.reference is not None:
            batch["reference"] = torch.from_numpy(np.ascontiguousarray(self.reference[np.asarray(indices)].T))
        return batch


def check(config: Config) -> Data:
    """Tokenise the pairs (once: they are cached) and check the loss; finds every mistake before a model is built.

    Pairs and reference log-probabilities are stored in the folder `pairs` of the cache, see
    `ds_llm.data.corpora.cache_folder`.
    """
    from ds_llm.evaluation.samples import check_prompts
    from ds_llm.pretrained.loading import load_tokenizer

    data, options = config.data, config.dpo
    if config.model.path is None:
        raise ConfigError("model.path: dpo aligns a model; name it, for example model.path=runs/sft")
    if not data.train:
        raise ConfigError("data.train: name the pairs to train on, for example data.train=data/pairs.jsonl")
    for name, default in (("format", "auto"), ("train_on", "all"), ("weights", []), ("tokens_per_batch", None)):
        if getattr(data, name) != default:
            raise ConfigError(f"data.{name}: is for sft; leave it out")
    for name in ("token_length", "stride"):
        if getattr(config.eval, name) is not None:
            raise ConfigError(f"eval.{name}: is for pretrain; dpo evaluates whole pairs")
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
    seq_len, limit = lengths(config)
    start = adapters.check(config)
    tokenizer = load_tokenizer(data.tokenizer or config.model.path)
    if options.reference:
        _check_reference(options.reference, tokenizer, seq_len)
    check_prompts(config, tokenizer, limit, chat=True)
    train, val = (
        Samples(
            prepare_pairs(
                list(sources),
                tokenizer,
                max_length=seq_len,
                truncate=data.truncate,
                cache=cache_folder() / "pairs",
                name=name,
            )
        )
        if sources
        else None
        for name, sources in (("train", data.train), ("val", data.val))
    )
    fingerprint = {"pairs": train.pairs.fingerprint, "seq_len": seq_len, **start}
    if loss.needs_reference:
        fingerprint["reference"] = identity(options.reference or config.model.path)
    return Data(loss, train, val, tokenizer, seq_len, fingerprint)


def _check_reference(path: str, tokenizer, seq_len: int) -> None:
    from ds_llm.data.tokens import tokenizer_hash
    from ds_llm.pretrained.loading import load_model_config, load_tokenizer

    limit = getattr(load_model_config(path).get_text_config(), "max_position_embeddings", None)
    if limit and seq_len > limit:
        raise UserError(f"data.seq_len: {seq_len} tokens are more than the {limit} positions of dpo.reference={path}")
    if tokenizer_hash(load_tokenizer(path)) != tokenizer_hash(tokenizer):
        raise UserError(f"dpo.reference: {path} has another tokenizer than the model, so their tokens do not compare")


def figures(config: Config) -> Figures:
    """Names of what evaluations and steps record beside what they do in every mode."""
    return Figures(("loss", *METRICS), METRICS)


def shown(data: Data) -> Shown:
    """The pairs for the eye."""
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
        # hashed here, where the weights are whole
        start = model_fingerprint(model) if config.dpo.reference is None else None

        def prepare(engine, stop) -> bool:
            with _reference(config, data, engine, model, start) as (forward, fingerprint):
                t = config.train
                batch = t.batch_size * t.accumulation_steps * engine.world_size
                steps = t.max_steps or math.ceil(t.epochs * len(data.train) / batch)
                for name, samples, batch_size, needed in (
                    ("train", data.train, t.batch_size, steps * batch),
                    ("val", data.val, _eval_batch(config), config.eval.max_windows or None),
                ):
                    if samples is not None:
                        samples.reference = reference_log_probs(
                            forward,
                            samples.pairs,
                            seed=t.seed,
                            batch_size=batch_size,
                            needed=needed,
                            stop=stop,
                            cache=cache_folder() / "pairs",
                            key={
                                "model": fingerprint,
                                "pairs": samples.pairs.fingerprint,
                                "dtype": t.dtype,
                                "attention": config.model.attention,
                                "kernels": t.kernels,
                            },
                            title=f"reference log-probabilities of {name}",
                        )
                        if samples.reference is None:
                            return False
            return True

    return Job(
        model,
        PreferenceObjective(model, data.loss),
        data.tokenizer,
        data.train,
        data.seq_len,
        _evaluation(config, data) if data.val is not None else None,
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
        `log_probs` only the summed log-probabilities of the answers [2, P].

        input_ids, labels (already shifted, -100 outside the answers), attention_mask: [2P, S]; index [P]; reference
        [2, P]. Both answers of a pair go through the model in one forward pass.
        """
        from ds_llm.models.head import lm_loss

        found = lm_loss(self.model, input_ids, labels, attention_mask=attention_mask, per_row=True)
        policy = -found.loss_sum.view(2, -1)
        if log_probs:
            return policy
        lengths = (labels != -100).sum(-1).view(2, -1)
        loss_sum, sums = self.loss(policy, reference, lengths)
        return MicroStep(loss_sum, found.aux_loss, found.aux_report, found.expert_counts, sums)


@contextlib.contextmanager
def _reference(config: Config, data: Data, engine, model: nn.Module, start: str | None):
    """(micro-batch -> log-probabilities [2, P] under the reference, its fingerprint) while the block runs."""
    if config.dpo.reference is None:
        adapter_off = model.disable_adapter() if is_adapter(model) else contextlib.nullcontext()
        engine.train(False)
        try:
            with torch.no_grad(), adapter_off:
                yield lambda batch: engine.forward(**batch, log_probs=True), start
        finally:
            engine.train()
        return
    from ds_llm.models import accelerate
    from ds_llm.models.head import attach_loss_head
    from ds_llm.pretrained.loading import load_model, match_tokenizer

    reference = load_model(config.dpo.reference, config.train.dtype, config.model.attention)
    match_tokenizer(reference, data.tokenizer)
    if config.train.kernels:
        accelerate(reference)
    attach_loss_head(reference)
    fingerprint = model_fingerprint(reference)
    with inference(PreferenceObjective(reference, None), config) as forward:
        yield lambda batch: forward(**batch, log_probs=True), fingerprint


def _eval_batch(config: Config) -> int:
    return config.eval.batch_size or config.train.batch_size


def _evaluation(config: Config, data: Data):
    val, size = data.val, _eval_batch(config)
    count = min(len(val), config.eval.max_windows or len(val))
    # the batches that the reference was given, so that a policy equal to it gets equal numbers
    order = SampleOrder(len(val), config.train.seed).permutation(0)
    batches = [order[first : min(first + size, count)] for first in range(0, count, size)]

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
