"""Pretraining on token files: next-token prediction over packed documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ds_llm.config.run import Config
from ds_llm.data.order import MixtureOrder
from ds_llm.data.tokens import TokenData
from ds_llm.errors import ConfigError, UserError
from ds_llm.models import accelerate
from ds_llm.models.first_weights import build_deferred
from ds_llm.pretrained import lora as adapters
from ds_llm.pretrained.architecture import architecture, build_model
from ds_llm.pretrained.lengths import lengths
from ds_llm.progress import console
from ds_llm.train.job import Figures, Job
from ds_llm.train.packing import check_packing, keep_apart
from ds_llm.train.start_model import recompute_layers, start_model
from ds_llm.train.step import MicroStep

if TYPE_CHECKING:
    from ds_llm.evaluation.measure import Streams

SHOWN_ROWS = 5  # rows without a text that are named


@dataclass
class Data:
    """Opened and checked inputs of a run."""

    train: TokenData
    order: MixtureOrder | None
    val: Streams | None
    tokenizer: object
    seq_len: int
    fingerprint: dict


def check(config: Config) -> Data:
    """Open the token files and the tokenizer; every mistake in them is found here, before any model is built."""
    from ds_llm.evaluation.measure import open_streams
    from ds_llm.evaluation.perplexity import check_length
    from ds_llm.evaluation.samples import check_prompts
    from ds_llm.pretrained.loading import load_tokenizer

    if not config.data.train:
        raise ConfigError("data.train: name the token files to train on, for example data.train=data/train.bin")
    for name in ("data.chat_template", "model.add_tokens"):
        section, key = name.split(".")
        if getattr(getattr(config, section), key):
            raise ConfigError(f"{name}: is for conversations; token files are made with their tokenizer")
    seq_len, limit = lengths(config)
    if seq_len % config.parallel.sequence:
        raise ConfigError(f"parallel.sequence: {config.parallel.sequence} does not divide data.seq_len={seq_len}")
    if config.data.isolate_documents:
        check_packing(config)
    train = TokenData(config.data.train, seq_len, config.data.isolate_documents)
    source = config.data.tokenizer or (config.model.path if config.model.path else train.files[0].tokenizer_path)
    if source is None:
        raise ConfigError("data.tokenizer: the token file records no tokenizer; name its folder")
    tokenizer = load_tokenizer(source)
    train.check_tokenizer(tokenizer)
    for file in train.files:
        file.check_untouched()
    order = _mixture(config, train)
    vocab_size = config.model.vocab_size
    if config.model.path is None and vocab_size and vocab_size < len(tokenizer):
        raise ConfigError(f"model.vocab_size: {vocab_size} is less than the tokenizer's {len(tokenizer)} tokens")
    val = None
    if config.data.val:
        length = config.eval.token_length or seq_len
        if limit and length > limit:
            raise UserError(f"eval.token_length: {length} tokens are more than the model's {limit} positions")
        if config.eval.stride and config.eval.stride > length:
            raise ConfigError(f"eval.stride: {config.eval.stride} is more than the evaluation's {length} tokens")
        val = open_streams(config.data.val, tokenizer)
        for path, row, reason in val.rejected[:SHOWN_ROWS]:
            console.print(f"warning: {path}: row {row} is not evaluated on: {reason}")
        if len(val.rejected) > SHOWN_ROWS:
            console.print(f"warning: data.val: {len(val.rejected):,} rows in all are not evaluated on")
        check_length(val.tokens, length)
    check_prompts(config, tokenizer, limit, chat=False)
    fingerprint = {
        "files": [file.meta["sha256"] for file in train.files],
        "seq_len": seq_len,
        "isolate_documents": config.data.isolate_documents,
        **({"weights": config.data.weights} if config.data.weights else {}),
        **adapters.check(config),
    }
    if config.model.config is not None:
        fingerprint["architecture"] = architecture(config, tokenizer).to_dict()
    return Data(train, order, val, tokenizer, seq_len, fingerprint)


def _mixture(config: Config, train: TokenData) -> MixtureOrder | None:
    """The order of samples that `data.weights` asks for;

    None without weights. Prints what an epoch takes of each file.
    """
    weights = config.data.weights
    if not weights:
        return None
    if len(weights) != len(train.files):
        raise ConfigError(
            f"data.weights: {len(weights)} weights for {len(train.files)} data.train files; give one each"
        )
    for weight, count, file in zip(weights, train.counts, train.files, strict=True):
        if not 0 < weight < float("inf"):
            raise ConfigError(f"data.weights: {weight} must be a number greater than 0")
        if not round(weight * count):
            raise ConfigError(
                f"data.weights: {weight:g} of the {count:,} samples of {file.path} draws none; raise it, or leave the "
                "file out of data.train"
            )
    order = MixtureOrder(train.counts, weights, config.train.seed)
    for file, count, drawn in zip(train.files, train.counts, order.drawn, strict=True):
        share = f"{drawn / order.samples:.1%} of an epoch"
        console.print(f"{file.path}: an epoch takes {drawn:,} of {count:,} samples, {share}")
    return order


def val_names(config: Config) -> list[str]:
    """Names under which evaluations record the loss of each file of `data.val`; empty where it is one stream."""
    paths = [Path(path) for path in config.data.val]
    if len(paths) < 2 or any(path.suffix != ".bin" for path in paths):
        return []  # texts are one stream
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [path.with_suffix("").as_posix() for path in paths]
    return [f"loss/{name}" for name in names]


def figures(config: Config) -> Figures:
    """Names of the figures that this mode adds to the records of evaluations and steps."""
    return Figures(val_names(config), ())


def build(config: Config, data: Data) -> Job:
    """Make or load the model and join it with the data."""
    from ds_llm.models.head import attach_loss_head

    torch.manual_seed(config.train.seed)
    if config.model.path is None:
        found = architecture(config, data.tokenizer)
        model = build_deferred(lambda: build_model(config, found)) if config.zero == 3 else build_model(config, found)
        if config.train.kernels and config.model.config is not None:
            console.print(str(accelerate(model)))
        attach_loss_head(model)
        if config.train.activation_checkpointing:
            recompute_layers(model)
    else:
        model = start_model(config, data.tokenizer)
    return job(config, data, model)


def job(config: Config, data: Data, model: nn.Module) -> Job:
    """Join a model whose loss head is attached with the data."""
    from ds_llm.evaluation.samples import sampling

    if config.data.isolate_documents:
        keep_apart(config, model)
    objective = LanguageModeling(model)
    evaluate = _evaluation(config, data) if data.val is not None else None
    sample = sampling(config, data.tokenizer, model, chat=False)
    return Job(model, objective, data.tokenizer, data.train, data.seq_len, evaluate, sample, order=data.order)


class LanguageModeling(nn.Module):
    """Next-token prediction with labels that are already shifted."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, per_row: bool = False, **batch) -> MicroStep | Tensor:
        """The loss of a micro-batch, see `ds_llm.models.head.lm_loss`; with `per_row` the summed loss in nats
        of each row [B]."""
        from ds_llm.evaluation.perplexity import model_loss
        from ds_llm.models.head import lm_loss

        if per_row:
            return model_loss(self.model, input_ids.device)(input_ids, labels)
        return MicroStep(*lm_loss(self.model, input_ids, labels, **batch))


def _evaluation(config: Config, data: Data):
    from ds_llm.evaluation.perplexity import perplexity_of_tokens

    length = config.eval.token_length or data.seq_len

    def evaluate(engine) -> dict:
        result = perplexity_of_tokens(
            lambda input_ids, labels: engine.forward(input_ids=input_ids, labels=labels, per_row=True),
            data.val.tokens,
            token_length=length,
            stride=config.eval.stride,
            batch_size=config.eval.batch_size or config.train.batch_size,
            max_windows=config.eval.max_windows,
            title="evaluating",
            share=engine.layout,
        )
        return {
            "perplexity": result.value,
            "loss": result.nll,
            "tokens": result.tokens,
            "windows": result.windows,
            "seconds": result.seconds,
            **dict(zip(val_names(config), result.streams, strict=False)),
        }

    return evaluate
