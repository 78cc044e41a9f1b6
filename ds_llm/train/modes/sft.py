"""Supervised fine-tuning: the loss counts on the assistant's answers, for every format of conversations or prompts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import nn

from ds_llm.config.run import Config
from ds_llm.data.batches import count_tokens
from ds_llm.data.corpora import cache_folder
from ds_llm.data.packing import GroupedSamples, PackedSamples
from ds_llm.errors import ConfigError, UserError
from ds_llm.pretrained import lora as adapters
from ds_llm.pretrained.lengths import lengths
from ds_llm.progress import console
from ds_llm.train.evaluation import measure
from ds_llm.train.job import Job, Shown
from ds_llm.train.packing import check_packing, keep_apart
from ds_llm.train.start_model import start_model
from ds_llm.train.start_tokenizer import start_tokenizer
from ds_llm.train.step import MicroStep


@dataclass
class Data:
    """Prepared and checked inputs of a run."""

    train: PackedSamples | GroupedSamples
    val: PackedSamples | GroupedSamples | None
    tokenizer: object
    seq_len: int
    fingerprint: dict


def check(config: Config) -> Data:
    """Tokenise, mask and pack the samples, and find every mistake before a model is built.

    Tokenised samples are cached in the folder `supervised`, see `ds_llm.data.corpora.cache_folder`.
    """
    from ds_llm.evaluation.samples import check_prompts

    data = config.data
    if config.model.path is None:
        raise ConfigError("model.path: sft fine-tunes a model; name it, for example model.path=runs/pretrain")
    if not data.train:
        raise ConfigError("data.train: name the samples to train on, for example data.train=data/train.jsonl")
    for name in ("token_length", "stride"):
        if getattr(config.eval, name) is not None:
            raise ConfigError(f"eval.{name}: is for pretrain; sft evaluates whole samples")
    if not data.packing and config.train.batch_size != 1:
        raise ConfigError(
            f"train.batch_size: {config.train.batch_size} must be 1 with data.packing=false, where a sample is a batch "
            "of up to data.tokens_per_batch tokens"
        )
    if data.packing and data.tokens_per_batch is not None:
        raise ConfigError("data.tokens_per_batch: is for data.packing=false; a packed batch has train.batch_size rows")
    if data.packing:
        check_packing(config)
    seq_len, limit = lengths(config)
    budget = data.tokens_per_batch or 4 * seq_len
    if budget < seq_len:
        raise ConfigError(f"data.tokens_per_batch: {budget} is less than data.seq_len={seq_len}")
    identity = adapters.check(config)
    tokenizer = start_tokenizer(config)
    check_prompts(config, tokenizer, limit, chat=True)
    documents = _prepare(config, data.train, tokenizer, seq_len, "train", data.weights)

    def arrange(documents):
        if data.packing:
            return PackedSamples(documents, seq_len, tokenizer.pad_token_id)
        return GroupedSamples(documents, budget, tokenizer.pad_token_id)

    train = arrange(documents)
    kind = "packs" if data.packing else "batches of similar length"
    console.print(f"{len(documents):,} samples in {len(train):,} {kind}, {train.fill:.1%} full")
    val = arrange(_prepare(config, data.val, tokenizer, seq_len, "val")) if data.val else None
    fingerprint = {
        "samples": documents.fingerprint,
        "seq_len": seq_len,
        "packing": data.packing,
        "tokens_per_batch": budget,
        **identity,
    }
    return Data(train, val, tokenizer, seq_len, fingerprint)


def _prepare(config: Config, sources: list[str], tokenizer, seq_len: int, what: str, weights=()):
    from ds_llm.data.supervised import prepare

    documents = prepare(
        list(sources),
        tokenizer,
        max_length=seq_len,
        format=config.data.format,
        train_on=config.data.train_on,
        truncate=config.data.truncate,
        weights=list(weights) or None,
        seed=config.train.seed,
        cache=cache_folder() / "supervised",
    )
    report = documents.report
    share = report["supervised_tokens"] / max(report["tokens"], 1)
    line = f"{what}: {report['samples']:,} samples, {report['tokens']:,} tokens, {share:.1%} supervised"
    if report["truncated"]:
        line += f"; {report['truncated']:,} truncated"
    if report["dropped"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items())
        line += f"; dropped {reasons}: see {report['rejects']}"
    console.print(line)
    return documents


def shown(data: Data) -> Shown:
    """The samples as `prepare.py show` prints them, before packing."""
    samples = data.train.documents
    return Shown(len(samples), lambda i: [(f"sample {i}", *samples.example(i))], samples.report)


def build(config: Config, data: Data) -> Job:
    """Load the model, with adapters where asked, and join it with the data."""
    return job(config, data, start_model(config, data.tokenizer))


def job(config: Config, data: Data, model: nn.Module) -> Job:
    """Join a model whose loss head is attached with the data."""
    from ds_llm.evaluation.samples import sampling

    if config.data.packing:
        keep_apart(config, model)
    evaluate = _evaluation(config, data.val) if data.val is not None else None
    sample = sampling(config, data.tokenizer, model, chat=True)
    return Job(model, SupervisedLoss(model), data.tokenizer, data.train, data.seq_len, evaluate, sample)


class SupervisedLoss(nn.Module):
    """Next-token prediction on the labelled tokens of packed or padded rows."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **batch) -> MicroStep:
        """The loss of a micro-batch, see `ds_llm.models.head.lm_loss`."""
        from ds_llm.models.head import lm_loss

        return MicroStep(*lm_loss(self.model, **batch))


def _evaluation(config: Config, val: PackedSamples | GroupedSamples):
    rows = config.eval.batch_size or config.train.batch_size
    if not config.data.packing:
        rows = 1  # each is a batch of its own
    count = min(len(val), config.eval.max_windows or len(val))
    batches = [range(first, min(first + rows, count)) for first in range(0, count, rows)]

    @torch.no_grad()
    def evaluate(engine) -> dict:
        """Loss per supervised token of the held-out samples, with the masks of training."""
        start = time.perf_counter()

        def loss_and_tokens(rows) -> tuple[float, int]:
            batch = val.batch(rows)
            return float(engine.forward(**batch).loss_sum), count_tokens(batch)

        losses, counts = measure(engine, batches, loss_and_tokens, 2).T
        tokens = counts.sum()
        if not tokens:
            raise UserError("data.val: no supervised token in the samples evaluated")
        loss = math.fsum(losses) / tokens
        return {
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "loss": loss,
            "tokens": int(tokens),
            "windows": count,
            "seconds": time.perf_counter() - start,
        }

    return evaluate
