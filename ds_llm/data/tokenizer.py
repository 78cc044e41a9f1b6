"""Trains, loads and saves tokenizers."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from ds_llm.data import files, rows, statistics
from ds_llm.data.resumable import AppendFile, beside, dump, partial, resumable, statistics_path, write_atomically
from ds_llm.data.workers import process
from ds_llm.errors import UserError, first_line
from ds_llm.progress import console

PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, BOS, EOS)
SAMPLE_CHARS = 1 << 20  # text that the compression is measured on
SMALLEST = 256 + len(SPECIAL)  # every byte, and the special tokens
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def load_tokenizer(path: str | os.PathLike):
    """The tokenizer in a folder or of a hub name. Raises `UserError` where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # of json, tokenizers (a bare Exception) and transformers: all are about these files
        reason = first_line(error)
        if "custom code" in reason:
            reason = "it is code that comes with the files, which is never run"
        raise UserError(f"{path}: no tokenizer could be loaded from here ({reason})") from None


def save_tokenizer(tokenizer, folder: str | os.PathLike) -> None:
    """Write a tokenizer's files into `folder`. Raises `OSError` where they cannot be written.

    The library of fast tokenizers raises a bare `Exception` with the error number in its text instead.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or not found:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from None


def train_tokenizer(inputs, out, *, vocab_size: int = 6400, field: str = "text", overwrite: bool = False) -> dict:
    """Train a byte-level BPE tokenizer on the rows of `inputs` into folder `out`; returns the statistics.

    Any text can be encoded and decodes to itself. Digits are single tokens. Special tokens: `<|endoftext|>` (padding,
    unknown), `<|im_start|>` (beginning) and `<|im_end|>` (end of a document and of a turn). The chat template marks
    what the assistant says, for assistant masks. The folder loads with `AutoTokenizer`; it appears when it is whole.
    """
    out = Path(out)
    if vocab_size < SMALLEST:
        raise UserError(f"--vocab-size {vocab_size}: must be at least {SMALLEST} (256 bytes and the special tokens)")
    sources = files.find(inputs)
    settings = {
        "command": "tokenizer",
        "inputs": [file.identity() for file in sources],
        "field": field,
        "vocab_size": vocab_size,
    }
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder for the tokenizer")
    with resumable(out, settings, overwrite) as run:
        if run.finished:
            console.print(f"{out}: finished before from the same input and settings; nothing to do")
            return run.statistics
        scratch, old = partial(out), beside(out, ".old")
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        state = {"records": 0, "dropped": {}, "bytes": 0, "sample": []}
        rejects = AppendFile(beside(out, ".rejects.jsonl"))
        tokenizer = _train(_texts(sources, field, state, rejects), vocab_size)
        if not state["bytes"]:
            run.discard([rejects])
            raise UserError(f"{out}: nothing to train on: {statistics.nothing_left(state)}")
        save_tokenizer(tokenizer, scratch)
        tokens = sum(len(ids) for ids in tokenizer(state["sample"])["input_ids"])
        result = {
            "records": state["records"],
            "dropped": state["dropped"],
            "bytes": state["bytes"],
            "vocab_size": len(tokenizer),
            "bytes_per_token": round(sum(len(text.encode()) for text in state["sample"]) / tokens, 3),
            "settings": run.settings,
        }
        write_atomically(statistics_path(scratch), dump(result))
        rejects.close()
        if rejects.size:
            os.replace(rejects.path, rejects.target)
        else:
            rejects.path.unlink()
            rejects.target.unlink(missing_ok=True)
        if out.exists():
            os.replace(out, old)
        os.replace(scratch, out)
        shutil.rmtree(old, ignore_errors=True)
        return result


def _train(texts, vocab_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        unk_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _texts(sources, field: str, state: dict, rejects: AppendFile):
    for path, items in process("reading", sources, state, _reader, (field,), 1, files.BATCH_BYTES):
        state["records"] += len(items)
        texts = [item.text for item in items if isinstance(item, rows.Document)]
        state["bytes"] += sum(len(text.encode()) for text in texts)
        if sum(map(len, state["sample"])) < SAMPLE_CHARS:
            state["sample"] += texts
        statistics.write_rejects(rejects, path, [item for item in items if isinstance(item, rows.Reject)], state)
        yield texts


def _reader(field: str):
    return lambda batch: list(rows.documents(batch, field))
