"""Rows as tokens to score: the tokens for the model, and which of them count."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ds_llm.data import chat, conversations, rows
from ds_llm.data.conversations import Malformed, RowError
from ds_llm.scoring import metrics
from ds_llm.scoring.metrics import Sample

SCORED, BAD, NO_OBJECT = 0, 1, 2  # `kind` of a row: measured, not usable, not even a JSON object
ROW = np.dtype([("end", "<i8"), ("cost", "<u4"), ("scored", "<u4"), ("kind", "u1"), ("truncated", "?")])
COUNTS = 1 << 31  # bit of a stored token that says that it counts


@dataclass
class Block:
    """Rows of one batch of records. tokens: uint32, those of all rows, `COUNTS` set where one counts; rows: `ROW` [n],
    `end` within this block; errors: (position in the block, line, reason, detail); lost: scored tokens cut away; taken:
    (line, name) of the first row that has an output field already."""

    tokens: np.ndarray
    rows: np.ndarray
    errors: list[tuple[int, int, str, str]] = field(default_factory=list)
    lost: int = 0
    taken: tuple[int, str] | None = None


def encoder(
    tokenizer,
    metric_names: Sequence[str],
    tokens: str,
    template: str,
    max_length: int | None,
    truncate: str,
    taken: Sequence[str],
) -> Callable[[tuple[str, rows.Batch]], Block]:
    """The function of an indexing worker: (format, batch of records) -> `Block`.

    taken: names that no input row may have, those of the output's fields.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    plain = template == "none" or not tokenizer.chat_template

    def encode_block(item: tuple[str, rows.Batch]) -> Block:
        name, batch = item
        records = list(rows.records(batch))
        block = Block(np.empty(0, np.uint32), np.zeros(len(records), ROW))
        ids: list[np.ndarray] = []
        for i, encoded in enumerate(_encode(tokenizer, records, name, tokens, plain)):
            record, result = records[i], block.rows[i]
            if not isinstance(record, rows.Reject) and block.taken is None:
                found = next((name for name in taken if name in record[1]), None)
                block.taken = (record[0], found) if found else None
            try:
                if isinstance(encoded, RowError):
                    raise encoded
                sample, lost = _cut(encoded, max_length, truncate)
            except RowError as error:
                bad_row = isinstance(record, rows.Reject)
                result["kind"] = NO_OBJECT if bad_row else BAD
                number = record.number if bad_row else record[0]
                block.errors.append((i, number, error.reason, error.detail))
                continue
            block.lost += lost
            result["truncated"] = len(sample) < len(encoded)
            result["end"], result["scored"] = len(sample), len(sample.targets)
            result["cost"] = metrics.cost(sample, metric_names)
            ids.append(sample.input_ids.astype(np.uint32) | np.where(sample.scored, COUNTS, 0).astype(np.uint32))
        block.tokens = np.concatenate(ids) if ids else block.tokens
        block.rows["end"] = np.cumsum(block.rows["end"])
        return block

    return encode_block


def decode(stored: np.ndarray) -> Sample:
    """A sample from its stored tokens, uint32 [n]."""
    return Sample((stored & (COUNTS - 1)).astype(np.int64), stored >= COUNTS)


def _encode(tokenizer, records: list, format: str, tokens: str, plain: bool) -> list[Sample | RowError]:
    """Every record as a whole sample, or why it cannot be one."""
    result: list = [RowError(r.reason, r.detail) if isinstance(r, rows.Reject) else None for r in records]
    texts = {}
    for i, record in enumerate(records):
        if result[i] is not None:
            continue
        try:
            if format == "text":
                texts[i] = _text(record[1])
            elif plain:
                result[i] = _plain(tokenizer, record[1], format, tokens)
            else:
                result[i] = _conversation(tokenizer, record[1], format, tokens)
        except RowError as error:
            result[i] = error
    if texts:
        # all at once: a tokenizer's call costs far more than a short text; spelt special tokens are text
        found = tokenizer(list(texts.values()), split_special_tokens=True, return_attention_mask=False, verbose=False)
        for i, ids in zip(texts, found["input_ids"], strict=True):
            result[i] = _sample(ids, True)
    return result


def _sample(ids: Sequence[int], scored) -> Sample | RowError:
    ids = np.asarray(ids, np.int64)
    if not len(ids):
        return RowError("empty", "no token")
    scored = np.array(np.broadcast_to(np.asarray(scored, bool), ids.shape))
    scored[0] = False  # nothing predicts the first token
    return Sample(ids, scored)


def _text(row: dict) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise Malformed("wrong type" if text is not None else "missing field", "text")
    if not text.strip():
        raise Malformed("empty", "text")
    return _unicode(text, "text")


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Malformed("not UTF-8", f"{where}, character {error.start + 1} is half of a surrogate pair") from None
    return text


def _conversation(tokenizer, row: dict, format: str, tokens: str) -> Sample | RowError:
    """A sample by the chat template. In a conversation without an answer no token counts."""
    messages, tools, columns = conversations.to_messages(row, format)
    if tokens != "all":
        try:
            encoded = chat.encode(tokenizer, messages, tools, columns, train_on="last" if tokens == "last" else "all")
            return _sample(encoded.input_ids, encoded.trained)
        except chat.Unmaskable as error:
            if error.reason != "no answer":
                raise
    text = chat.render(tokenizer, messages, chat.context_of(tokenizer, tools, columns))
    return _sample(chat.tokenise(tokenizer, text, []).input_ids, tokens == "all")


def _plain(tokenizer, row: dict, format: str, tokens: str) -> Sample | RowError:
    """A sample of prompt and completion, after the beginning-of-text token where the tokenizer adds one."""
    texts = [row.get("prompt"), row.get("completion")]
    for name, text in zip(("prompt", "completion"), texts, strict=True):
        if text is None:
            raise Malformed("missing field", name)
        if not isinstance(text, str):
            raise RowError("no chat template", f"{name} is no text, and only a chat template can render it")
        _unicode(text, name)
    used = next((name for name in ("system", "tools") if row.get(name)), None)
    if used:
        raise RowError("no chat template", f"{used} shows in no text without one")
    text, start = "".join(texts), len(texts[0])
    encoded = chat.tokenise(tokenizer, text, [(start, len(text))])
    first = tokenizer("", verbose=False)["input_ids"][:1]
    first = first if first == [tokenizer.bos_token_id] else []
    trained = [False] * len(first) + encoded.trained
    return _sample(first + encoded.input_ids, True if tokens == "all" else trained)


def _cut(sample: Sample, max_length: int | None, truncate: str) -> tuple[Sample, int]:
    """The sample within `max_length` tokens, and how many scored ones were cut away."""
    length, count = len(sample), len(sample.targets)
    if max_length is None or length <= max_length:
        return sample, 0
    if truncate == "error":
        raise RowError("too long", f"{length:,} tokens, more than {max_length:,}")
    keep = slice(max_length) if truncate == "right" else slice(length - max_length, None)
    cut = Sample(sample.input_ids[keep], sample.scored[keep])
    if count and not len(cut.targets):
        raise RowError("cut off", f"none of the {count:,} scored tokens is within {max_length:,} of {length:,}")
    return cut, count - len(cut.targets)
