"""Greedy answers of a model to prompts, compared with references: during training and by `launch/evaluate.py`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ds_llm.compat.peft import without_wrapper
from ds_llm.config.run import Config
from ds_llm.config.text_metrics import LABELS, check_metrics
from ds_llm.distributed.collectives import gather
from ds_llm.distributed.environment import rank
from ds_llm.errors import ConfigError, UserError
from ds_llm.evaluation.measure import circumstances, process_group
from ds_llm.evaluation.references import References, read_references
from ds_llm.evaluation.text_metrics import compare, signatures
from ds_llm.generation.generator import Generator
from ds_llm.generation.sampling import SamplingParams
from ds_llm.pretrained.architecture import architecture
from ds_llm.pretrained.lengths import max_positions
from ds_llm.pretrained.loading import load_model, load_model_config, load_tokenizer
from ds_llm.progress import console, progress

if TYPE_CHECKING:
    from ds_llm.train.job import Job

KEY = "eval.generation_metrics"


def generate(generator: Generator, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int) -> list[str]:
    """The greedy answer to each of these encoded prompts, the same list on every rank. Collective.

    Batches are dealt to the ranks; their content, and so the answers, do not depend on the number of ranks. With a
    synced `generator` every rank runs equally many batches.
    """
    together = dist.is_initialized()
    mine, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # similar lengths need less padding
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    found: dict[int, str] = {}
    with progress("generating", total=len(prompts), unit="prompts") as task:
        for first in range(0, len(batches), world):
            number = first + mine
            if number < len(batches) or generator.synced:
                rows = batches[min(number, len(batches) - 1)]
                texts = generator.batch_generate([prompts[i] for i in rows], params, batch_size=len(rows))
                if number < len(batches):
                    found.update(zip(rows, texts, strict=True))
            task.advance(sum(map(len, batches[first : first + world])))
    if together and world > 1:
        found = {i: text for part in gather(found) for i, text in part.items()}
    return [found[i] for i in range(len(prompts))]


def prepare(config: Config, tokenizer) -> Callable[[Job], None]:
    """Read and check the data for `eval.generation_metrics`. Returns a function that adds them to a job's evaluation.

    Without metrics that function does nothing. Raises `ConfigError` or `UserError`.
    """
    options = config.eval
    if not options.generation_metrics:
        if options.generation_data:
            raise ConfigError(f"eval.generation_data: is for {KEY}, which is empty")
        return lambda job: None
    if not config.data.val:
        raise ConfigError(f"{KEY}: needs data.val: they are taken at its evaluations")
    check_metrics(options.generation_metrics, options.generation_tokenizer, KEY)
    positions = max_positions(architecture(config))
    references = read_references(
        options.generation_data or config.data.val,
        tokenizer,
        max_new_tokens=options.max_new_tokens,
        positions=positions,
        rows=options.generation_rows,
        where="eval.generation_data" if options.generation_data else KEY,
    )
    _check_words(references, options.generation_metrics, options.generation_tokenizer, "eval.generation_tokenizer")
    console.print(f"{KEY}: {references.describe()}")

    def add(job: Job) -> None:
        evaluate = job.evaluate

        def extended(engine) -> dict:
            figures = evaluate(engine)
            start = time.perf_counter()
            # under ZeRO-3, or with shared experts, a rank's forward pass needs the others'
            synced = engine.stage == 3 or engine.layout.expert > 1
            generator = Generator(without_wrapper(job.model), tokenizer, synced=synced)
            size = options.batch_size or config.train.batch_size
            texts = generate(generator, references.ids, options.max_new_tokens, size)
            figures |= compare(texts, references.answers, options.generation_metrics, options.generation_tokenizer)
            figures["seconds"] += time.perf_counter() - start
            return figures | {"generated": len(texts)}

        job.evaluate = extended
        job.info["generation_metrics"] = signatures(options.generation_metrics, options.generation_tokenizer)

    return add


def measure_generations(
    model_path: str,
    data: Sequence[str | os.PathLike],
    metrics: Sequence[str],
    *,
    word_tokenizer: str = "13a",
    tokenizer_path: str | None = None,
    rows: int = 0,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    dtype: str = "auto",
    out: str | None = None,
) -> tuple[dict, dict]:
    """Figures of a model's greedy answers to the prompts of `data`, and what they were measured on, for a JSON file.

    metrics: of `ds_llm.config.text_metrics.METRICS`; word_tokenizer: see `ds_llm.evaluation.text_metrics.compare`.
    rows: only the first ones; 0: all. dtype: fp32, bf16, fp16; auto is fp32 on a CPU and the saved type on a GPU. out:
    a JSON-lines file to write, each row with `prompt`, `reference` and `generation`.

    In a process group of several ranks each takes its share. All mistakes are raised as `UserError`, those that need
    no weights before any are loaded.
    """
    for name, value, least in (("rows", rows, 0), ("max-new-tokens", max_new_tokens, 1), ("batch-size", batch_size, 1)):
        if value < least:
            raise ConfigError(f"{name}: {value} must be at least {least}")
    check_metrics(metrics, word_tokenizer, "metrics")
    positions = max_positions(load_model_config(model_path))
    tokenizer = load_tokenizer(tokenizer_path or model_path)
    references = read_references(data, tokenizer, max_new_tokens=max_new_tokens, positions=positions, rows=rows)
    _check_words(references, metrics, word_tokenizer, "words")
    console.print(references.describe())
    if out and rank() == 0:
        _write(out, [])  # whether it can be written is told before the work
    start = time.perf_counter()
    with process_group() as device:
        model = load_model(model_path, "fp32" if dtype == "auto" and device.type == "cpu" else dtype).to(device)
        try:
            texts = generate(Generator(model, tokenizer), references.ids, max_new_tokens, batch_size)
        except torch.cuda.OutOfMemoryError:
            raise UserError("the GPU has too little memory for this; lower --batch-size", any_rank=True) from None
    figures = compare(texts, references.answers, metrics, word_tokenizer)
    if out and rank() == 0:
        parts = zip(references.prompts, references.answers, texts, strict=True)
        _write(out, [dict(zip(("prompt", "reference", "generation"), part, strict=True)) for part in parts])
    about = {
        "rows": len(references),
        "references_longer": references.longer,
        "max_new_tokens": max_new_tokens,
        "signatures": signatures(metrics, word_tokenizer),
        "seconds": time.perf_counter() - start,
    }
    about |= circumstances(model_path, data, references.rejected, model, batch_size)
    return figures, about


def describe(figures: dict, about: dict) -> str:
    """The result as one line."""
    parts = [f"{LABELS[name]} {value:.2f}" for name, value in figures.items()]
    how = f"{about['rows']:,} prompts, at most {about['max_new_tokens']:,} tokens each"
    return f"{'  '.join(parts)}  ({how})  {about['seconds']:.1f} s"


def _check_words(references: References, metrics: Sequence[str], tokenizer: str, option: str) -> None:
    """Raise `UserError` where ROUGE would be 0 for any generated text."""
    if "rouge" not in metrics or tokenizer != "13a":
        return
    empty = sum(not any(c.isascii() and c.isalnum() for c in answer) for answer in references.answers)
    if 2 * empty > len(references):
        raise UserError(
            f"{option}: {empty:,} of {len(references):,} references have none of the letters a-z and digits that ROUGE "
            "compares; choose zh, intl or char"
        )


def _write(path: str, rows: list[dict]) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
