"""Perplexity of a model on files: `launch/evaluate.py perplexity`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ds_llm import hardware
from ds_llm.data.files import Position, find, read
from ds_llm.data.rows import Document, documents
from ds_llm.data.tokens import TokenFile
from ds_llm.distributed.environment import world_size
from ds_llm.errors import UserError
from ds_llm.evaluation.perplexity import Perplexity, check_windows, model_loss, perplexity_of_tokens
from ds_llm.models.head import attach_loss_head
from ds_llm.pretrained.lengths import max_positions
from ds_llm.pretrained.loading import load_model, load_model_config, load_tokenizer, match_tokenizer
from ds_llm.progress import console

WINDOW = 2048  # of the published figures
SEPARATOR = "\n\n"  # between texts, likewise
TEXT_FIELD = "text"
NAMED_ROWS = 5  # line numbers named per reason


@dataclass
class Streams:
    """Tokens to evaluate on: `tokens` is one array [n] per stream; texts are one stream, a token file is one each.

    `documents` counts them; `rejected` lists (file, line or row number, reason) of rows without a usable text.
    """

    tokens: list[np.ndarray]
    kind: str  # "text" or "tokens"
    documents: int
    rejected: list[tuple[str, int, str]] = field(default_factory=list)


def open_streams(paths: Sequence[str | os.PathLike], tokenizer, text_field: str = TEXT_FIELD) -> Streams:
    """Token files (.bin), or texts in any format of `ds_llm.data.files` joined by blank lines and tokenised at once.

    Empty texts stay in, as in the published protocol: they add their two newlines. Raises `UserError` for a mixture of
    both kinds, a token file of another tokenizer, a missing file, or when there is no text.
    """
    binary = [str(path).endswith(".bin") for path in paths]
    if any(binary):
        if not all(binary):
            raise UserError("token files (.bin) and texts cannot be evaluated together; give one kind")
        if text_field != TEXT_FIELD:
            raise UserError(f"field '{text_field}': token files have no fields; leave it out")
        files = [TokenFile(path) for path in paths]
        for file in files:
            file.check_tokenizer(tokenizer)
            file.check_untouched()
            file.check_ids(file.tokens, 0)
        return Streams([file.tokens for file in files], "tokens", sum(file.meta["documents"] for file in files))
    texts, rejected = read_texts(paths, text_field)
    if not any(text.strip() for text in texts):
        why = f": {_counts(rejected)}" if rejected else ""
        raise UserError(f"{', '.join(map(str, paths))}: no text to evaluate on{why}")
    ids = tokenizer(SEPARATOR.join(texts), verbose=False)["input_ids"]
    return Streams([np.asarray(ids, np.int64)], "text", len(texts), rejected)


def read_texts(paths: Iterable[str | os.PathLike], text_field: str) -> tuple[list[str], list[tuple[str, int, str]]]:
    """All texts in order, empty ones included, and (file, line or row, reason) of the rows that have none."""
    texts, rejected = [], []
    files = find(paths)
    for batch in read(files, Position()):
        for row in documents(batch, text_field):
            if isinstance(row, Document) or row.text is not None:
                texts.append(row.text)
            else:
                rejected.append((str(files[batch.file].path), row.number, f"{row.reason} ({row.detail})"))
    return texts, rejected


def measure(
    model_path: str,
    data: Sequence[str | os.PathLike],
    *,
    window: int | None = None,
    stride: int | None = None,
    tokenizer_path: str | None = None,
    text_field: str = TEXT_FIELD,
    batch_size: int = 1,
    max_windows: int = 0,
    dtype: str = "auto",
) -> tuple[Perplexity, dict]:
    """Perplexity of a causal language model on files, and what it was measured on, for a JSON file.

    window: tokens per window; by default 2048, or the model's positions where those are fewer. stride: see
    `perplexity_of_tokens`. dtype: fp32, bf16, fp16; auto is fp32 on a CPU and the type the model was saved in on a GPU.

    In a process group of several ranks (those of `deepspeed` or `torchrun`) each takes its share of the windows. All
    mistakes are raised as `UserError`, those that need no weights before any are loaded.
    """
    positions = max_positions(load_model_config(model_path))
    window = min(WINDOW, positions or WINDOW) if window is None else window
    stride = window if stride is None else stride
    check_windows(window, stride, batch_size, max_windows)
    if positions and window > positions:
        raise UserError(f"window {window:,}: longer than the {positions:,} positions of {model_path}")
    tokenizer = load_tokenizer(tokenizer_path or model_path)
    streams = open_streams(data, tokenizer, text_field)
    if streams.rejected:
        console.print(f"warning: {len(streams.rejected):,} rows left out: {_counts(streams.rejected)}")
    if window > (longest := max(map(len, streams.tokens))):
        raise UserError(f"{', '.join(map(str, data))}: {longest:,} tokens, less than one window of {window:,}")
    with process_group() as device:
        model = load_model(model_path, "fp32" if dtype == "auto" and device.type == "cpu" else dtype)
        match_tokenizer(model, tokenizer)
        attach_loss_head(model).to(device)
        try:
            result = perplexity_of_tokens(
                model_loss(model, device),
                streams.tokens,
                token_length=window,
                stride=stride,
                batch_size=batch_size,
                max_windows=max_windows,
            )
        except torch.cuda.OutOfMemoryError:
            raise UserError("the GPU has too little memory for this; lower --batch-size", any_rank=True) from None
    about = circumstances(model_path, data, streams.rejected, model, batch_size)
    about |= {"data_kind": streams.kind, "documents": streams.documents}
    return result, about


def circumstances(
    model_path: str | os.PathLike, data: Sequence, rejected: Sequence[tuple], model: torch.nn.Module, batch_size: int
) -> dict:
    """Model, data, versions and machine of a measurement, for its JSON file.

    rejected: (file, line or row number, reason) of rows that were left out.
    """
    return {
        "model": str(model_path),
        "data": [str(path) for path in data],
        "rejected": [dict(zip(("file", "row", "reason"), entry, strict=True)) for entry in rejected],
        "batch_size": batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": hardware.device_name(),
        "world_size": world_size(),
        "environment": hardware.environment(),
    }


def describe(result: Perplexity) -> str:
    """The result as one line."""
    return (
        f"perplexity {result.value:.4f}  ({result.nll:.6f} nats per token; {result.windows:,} windows of "
        f"{result.token_length:,} tokens, stride {result.stride:,}; {result.tokens:,} tokens scored, "
        f"{result.dropped_tokens:,} of {result.stream_tokens:,} left over)  {result.seconds:.1f} s"
    )


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Yield this process's device. With several processes they form a process group while the block runs.

    A process group that is open already stays open.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        hardware.share_cores()
    opened = not dist.is_initialized()
    if world_size() > 1:
        from ds_llm.engine.processes import init_distributed

        init_distributed()
    try:
        yield torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    finally:
        if opened and dist.is_initialized():
            dist.destroy_process_group()


def _counts(rejected: list[tuple[str, int, str]]) -> str:
    """`2 bad JSON (x.jsonl line 3, 9), ...`, by reason."""
    reasons = Counter(reason.split(" (")[0] for _, _, reason in rejected)
    parts = []
    for reason, count in reasons.most_common():
        rows = [f"{Path(file).name}:{row}" for file, row, why in rejected if why.split(" (")[0] == reason]
        more = ", …" if count > NAMED_ROWS else ""
        parts.append(f"{count:,} {reason} ({', '.join(rows[:NAMED_ROWS])}{more})")
    return ", ".join(parts)
