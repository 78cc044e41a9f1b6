"""What the modes that learn from preferences share: checks, the reference model, log-probabilities under it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ds_llm.compat.peft import is_adapter
from ds_llm.config.run import Config
from ds_llm.data.corpora import cache_folder
from ds_llm.data.order import SampleOrder
from ds_llm.engine.engine import Engine
from ds_llm.engine.inference import inference
from ds_llm.errors import ConfigError, UserError
from ds_llm.pretrained import lora as adapters
from ds_llm.pretrained.fingerprint import identity, model_fingerprint
from ds_llm.pretrained.lengths import lengths, max_positions
from ds_llm.train.reference import reference_log_probs
from ds_llm.train.start_tokenizer import start_tokenizer


class Scored(Protocol):
    """Samples with their log-probabilities under the reference, once those are known.

    `reference`: float32 [samples, columns] in nats, of the samples that the run uses. `scored(indices)`: batches whose
    rows, one batch after the other, are the first column of these samples, then the second, ... `fingerprint`: of all
    tokens that are scored, as JSON.
    """

    columns: int
    fingerprint: dict
    reference: np.ndarray | None

    def __len__(self) -> int: ...

    def scored(self, indices) -> list[dict[str, Tensor]]: ...


def check_keys(config: Config, example: str) -> None:
    """Raise `ConfigError` where the model or the data is missing, and for keys of other modes.

    example: a file that could be trained on.
    """
    mode, data = config.mode, config.data
    if config.model.path is None:
        raise ConfigError(f"model.path: {mode} aligns a model; name it, for example model.path=runs/sft")
    if not data.train:
        raise ConfigError(f"data.train: name the data to train on, for example data.train={example}")
    for name, default in (("format", "auto"), ("train_on", "all"), ("weights", []), ("tokens_per_batch", None)):
        if getattr(data, name) != default:
            raise ConfigError(f"data.{name}: is for sft; leave it out")
    for name in ("token_length", "stride"):
        if getattr(config.eval, name) is not None:
            raise ConfigError(f"eval.{name}: is for pretrain; {mode} evaluates whole answers")


def check_reference(config: Config, path: str | None, tokenizer, seq_len: int) -> str:
    """What the reference model is, for the run's fingerprint; `path` None: the start model.

    Raises `UserError` for one whose positions do not suffice or whose tokenizer is another.
    """
    from ds_llm.data.tokens import tokenizer_hash
    from ds_llm.pretrained.loading import load_model_config, load_tokenizer

    if path is None:
        return identity(config.model.path)
    key = f"{config.mode}.reference"
    limit = max_positions(load_model_config(path))
    if limit and seq_len > limit:
        raise UserError(f"data.seq_len: {seq_len} tokens are more than the {limit} positions of {key}={path}")
    if tokenizer_hash(load_tokenizer(path)) != tokenizer_hash(tokenizer):
        raise UserError(f"{key}: {path} has another tokenizer than the model, so their tokens do not compare")
    return identity(path)


class Prepared(NamedTuple):
    """Data of a run, `val` None without `data.val`. start: identities of the models that it starts from."""

    train: Scored
    val: Scored | None
    tokenizer: object
    seq_len: int
    start: dict


def prepare(
    config: Config,
    tokenise: Callable,
    samples: Callable[..., Scored],
    reference: str | None,
    needs_reference: bool = True,
) -> Prepared:
    """Tokenise `data.train` and `data.val` into the cache and check tokenizer, prompts and reference model.

    tokenise: `prepare_pairs` or `prepare_labelled`; samples: makes `Scored` of what it returns. reference: path of the
    reference model, None for the start model. Raises `ConfigError` or `UserError`.
    """
    from ds_llm.evaluation.samples import check_prompts

    seq_len, limit = lengths(config)
    start = adapters.check(config)
    tokenizer = start_tokenizer(config)
    if needs_reference:
        start["reference"] = check_reference(config, reference, tokenizer, seq_len)
    check_prompts(config, tokenizer, limit, chat=True)
    options = {"max_length": seq_len, "truncate": config.data.truncate, "cache": cache()}
    train, val = (
        samples(tokenise(list(sources), tokenizer, **options, name=name)) if sources else None
        for name, sources in (("train", config.data.train), ("val", config.data.val))
    )
    return Prepared(train, val, tokenizer, seq_len, start)


def cache() -> Path:
    """Where tokenised preferences and log-probabilities under references are kept."""
    return cache_folder() / "pairs"


def eval_batch(config: Config) -> int:
    """Samples of a forward pass of an evaluation."""
    return config.eval.batch_size or config.train.batch_size


def eval_batches(config: Config, samples: Scored) -> list[np.ndarray]:
    """Numbers of the held-out samples that are evaluated, by batches.

    They are the batches that the reference was given, so a policy equal to it gets equal numbers.
    """
    count, size = min(len(samples), config.eval.max_windows or len(samples)), eval_batch(config)
    order = SampleOrder(len(samples), config.train.seed).permutation(0)
    return [order[first : min(first + size, count)] for first in range(0, count, size)]


def reference_pass(
    config: Config,
    path: str | None,
    model: nn.Module,
    tokenizer,
    objective: Callable[[nn.Module], nn.Module],
    train: Scored,
    val: Scored | None,
) -> Callable[[Engine, Callable[[], bool]], bool]:
    """The `Job.prepare` that fills in `reference` of the samples; call it where the weights of `model` are whole.

    path: the reference model, None for the start model with its adapters off. objective: of a model the module that
    with `log_probs=True` gives the summed log-probability of each row's answer, [B]; also what the engine holds.
    """
    start = model_fingerprint(model) if path is None else None

    def prepare(engine: Engine, stop: Callable[[], bool]) -> bool:
        t = config.train
        batch = t.batch_size * t.accumulation_steps * engine.world_size
        steps = t.max_steps or math.ceil(t.epochs * len(train) / batch)
        with (
            _start_model(engine, model, start)
            if path is None
            else _other_model(config, path, tokenizer, objective) as (forward, fingerprint)
        ):
            for name, samples, batch_size, needed in (
                ("train", train, t.batch_size, steps * batch),
                ("val", val, eval_batch(config), config.eval.max_windows or None),
            ):
                if samples is None:
                    continue
                samples.reference = reference_log_probs(
                    forward,
                    samples,
                    seed=t.seed,
                    batch_size=batch_size,
                    needed=needed,
                    stop=stop,
                    cache=cache(),
                    key={
                        "model": fingerprint,
                        **samples.fingerprint,
                        "dtype": t.dtype,
                        "attention": config.model.attention,
                        "kernels": t.kernels,
                    },
                    title=f"reference log-probabilities of {name}",
                )
                if samples.reference is None:
                    return False
        return True

    return prepare


@contextlib.contextmanager
def _start_model(engine: Engine, model: nn.Module, fingerprint: str) -> Iterator[tuple[Callable, str]]:
    """(batch -> log-probabilities under the start model, its fingerprint) while the block runs."""
    adapter_off = model.disable_adapter() if is_adapter(model) else contextlib.nullcontext()
    engine.train(False)
    try:
        with torch.no_grad(), adapter_off:
            yield lambda batch: engine.forward(**batch, log_probs=True), fingerprint
    finally:
        engine.train()


@contextlib.contextmanager
def _other_model(config: Config, path: str, tokenizer, objective: Callable) -> Iterator[tuple[Callable, str]]:
    """(batch -> log-probabilities under the model at `path`, its fingerprint) while the block runs."""
    from ds_llm.models import accelerate
    from ds_llm.models.head import attach_loss_head
    from ds_llm.pretrained.loading import load_model, match_tokenizer

    reference = load_model(path, config.train.dtype, config.model.attention, deferred=True)
    match_tokenizer(reference, tokenizer)
    if config.train.kernels:
        accelerate(reference)
    attach_loss_head(reference)
    fingerprint = model_fingerprint(reference)
    with inference(objective(reference), config) as forward:
        yield lambda batch: forward(**batch, log_probs=True), fingerprint
