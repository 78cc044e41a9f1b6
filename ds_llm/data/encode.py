"""Tokenises documents into token files, in parallel and resumable."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ds_llm.data import files, rows, statistics
from ds_llm.data.files import Batch
from ds_llm.data.resumable import SAVE_SECONDS, AppendFile, beside, partial, resumable, write_atomically
from ds_llm.data.workers import available_cpus, process
from ds_llm.errors import UserError
from ds_llm.progress import console


def encoder(field: str, backend: str | None, source: str, eos: int, dtype: str, validation: float) -> Callable:
    """The worker's function: batch -> ([(tokens, lengths) of training, of validation], [Reject]).

    backend: the tokenizer as JSON of the `tokenizers` library; none: it is loaded from `source` by transformers. Text
    that spells a special token is encoded as the text that it is.
    """
    encode = _fast(backend) if backend else _slow(source)
    limit = int(validation * 2**64)

    def encode_batch(batch: Batch):
        texts, dropped = [], []
        for item in rows.documents(batch, field):
            if isinstance(item, rows.Document):
                texts.append(item.text)
            else:
                dropped.append(item)
        parts = [_join(encode(part), eos, dtype) for part in _split(texts, limit)]
        return parts, dropped

    return encode_batch


def _fast(backend: str) -> Callable:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(backend)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return lambda texts: [item.ids for item in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _slow(source: str) -> Callable:
    from ds_llm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source)
    return lambda texts: [tokenizer.encode(t, add_special_tokens=False, split_special_tokens=True) for t in texts]


def _split(texts: list[str], limit: int) -> tuple[list[str], list[str]]:
    """(training texts, validation texts), chosen by each text's hash, so that equal texts are on the same side."""
    if not limit:
        return texts, []
    parts: tuple[list[str], list[str]] = [], []
    for text in texts:
        value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        parts[value < limit].append(text)
    return parts


def _join(documents: list[list[int]], eos: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """All ids, with `eos` behind each document [tokens], and the documents' lengths with `eos` [documents]."""
    flat: list[int] = []
    for ids in documents:
        flat += ids
        flat.append(eos)
    return np.array(flat, dtype), np.array([len(ids) + 1 for ids in documents], np.int64)


def validation_path(out: Path) -> Path:
    """`NAME.val.bin` beside `NAME.bin`."""
    return out.with_suffix(".val.bin")


def encode(
    inputs,
    out,
    tokenizer,
    *,
    field: str = "text",
    validation: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    batch_bytes: int = files.BATCH_BYTES,
    save_seconds: float = SAVE_SECONDS,
) -> dict:
    """Tokenise the rows of `inputs` to the token file `out` (.bin), in order; returns the statistics.

    tokenizer: a folder or a name on the hub. validation: share of the documents, chosen by the hash of their text,
    that goes to `NAME.val.bin` instead. Each document is followed by the tokenizer's end-of-text token; no other
    special token is added. Beside `out`: `NAME.idx`, `NAME.bin.rejects.jsonl` (when a row was dropped),
    `NAME.bin.stats.json`, `NAME.bin.png`. Interrupted, the same call continues, and the result is the same byte for
    byte; finished, it does nothing.
    """
    from ds_llm.data.tokenizer import load_tokenizer
    from ds_llm.data.tokens import TokenWriter, index_path, tokenizer_hash

    out = Path(out)
    if out.suffix != ".bin":
        raise UserError(f"{out}: a token file's name ends with .bin")
    if not 0 <= validation < 1:
        raise UserError(f"--validation {validation}: must be at least 0 and less than 1")
    sources = files.find(inputs)
    loaded = load_tokenizer(tokenizer)
    if loaded.eos_token_id is None:
        raise UserError(f"{tokenizer}: has no end-of-text token to put between documents; set its eos_token")
    rejects, png = beside(out, ".rejects.jsonl"), beside(out, ".png")
    identity = {
        "vocab_size": max(len(loaded), max(loaded.get_vocab().values()) + 1),
        "eos_token_id": loaded.eos_token_id,
        "tokenizer_hash": tokenizer_hash(loaded),
    }
    settings = {
        "command": "tokens",
        "inputs": [file.identity() for file in sources],
        "field": field,
        "validation": validation,
        "tokenizer": os.path.abspath(tokenizer) if os.path.isdir(tokenizer) else str(tokenizer),
        **identity,
    }
    targets = [out, validation_path(out)] if validation else [out]
    with resumable(out, settings, overwrite) as run:
        if run.finished:
            console.print(f"{out}: finished before from the same input and settings; nothing to do")
            return run.statistics
        if targets[-1].exists() and not overwrite and not run.state:
            raise UserError(f"{targets[-1]}: is there already; use --overwrite or choose another --out")
        state = run.state or {"records": 0, "dropped": {}, "rejects": 0, "files": [None, None]}
        dropped = AppendFile(rejects, state["rejects"])
        writers = [
            TokenWriter(target, tokenizer=str(tokenizer), state=saved, **identity)
            for target, saved in zip(targets, state["files"], strict=False)
        ]

        def save() -> None:
            run.save(state | {"rejects": dropped.save(), "files": [writer.save() for writer in writers]})

        backend = getattr(loaded, "backend_tokenizer", None)
        make = (field, backend.to_str() if backend else None, str(tokenizer), loaded.eos_token_id)
        make += (writers[0].dtype.str, validation)
        for path, (parts, refused) in process(
            "tokenising", sources, state, encoder, make, workers or available_cpus(), batch_bytes
        ):
            state["records"] += len(refused) + sum(len(lengths) for _, lengths in parts)
            for writer, (tokens, lengths) in zip(writers, parts, strict=False):
                writer.append(tokens, lengths)
            statistics.write_rejects(dropped, path, refused, state)
            if run.due(save_seconds):
                save()
        save()
        for writer in writers:
            if not writer.documents:
                written = sum(other.documents for other in writers)
                run.discard([dropped, *(file for other in writers for file in other.files)])
                if not written:
                    raise UserError(f"{out}: nothing to write: {statistics.nothing_left(state)}")
                raise UserError(
                    f"{writer.path}: none of the {written:,} documents falls to it with --validation {validation:g}; "
                    "choose another share"
                )
        lengths = [statistics.summary(writer.lengths()) for writer in writers]
        result = {"records": state["records"], "dropped": state["dropped"], "lengths": lengths[0]}
        if validation:
            result["validation_lengths"] = lengths[1]
        write_atomically(partial(png), statistics.picture(lengths[0], "tokens", out.name))
        dropped.close()
        for writer in writers:
            writer.seal()
        names = [path for target in targets for path in (target, index_path(target))]
        return run.finish([*names, rejects, png], result, scratch=[writer.files[1].path for writer in writers])
