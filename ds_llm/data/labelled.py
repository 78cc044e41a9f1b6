"""Answers labelled desirable or undesirable, and what each prompt is paired with that was not answered to it.

A row holds `label` (true, false, 1 or 0) and a conversation that ends with an answer: `prompt` and `completion`, or
`messages` of which the last is the answer (`ds_llm.data.conversations`). A preference pair gives two answers: `chosen`
is desirable, `rejected` is not. Stored by `ds_llm.data.answers`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ds_llm.data import answers, conversations, pairs
from ds_llm.data.answers import Answer, Answers, with_labels
from ds_llm.data.conversations import RowError
from ds_llm.data.order import SampleOrder
from ds_llm.errors import UserError

if TYPE_CHECKING:
    import torch


class LabelledAnswers(Answers):
    """Stored answers with labels: `len()`, `batch(indices)`, `mismatched(indices, partners)`."""

    def __init__(self, folder: Path, pad: int, max_length: int):
        super().__init__(folder, pad)
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices) -> dict[str, torch.Tensor]:
        """Padded rows of these answers to their prompts: `input_ids`, `labels`, `attention_mask` [B, S] int64."""
        return self.padded([self.sequence(int(i)) for i in indices])

    def mismatched(self, indices, partners: np.ndarray) -> dict[str, torch.Tensor]:
        """The same of these prompts with the answers of their `partners`, cut at `max_length` tokens."""
        return self.padded([self._joined(int(i), int(partners[i])) for i in indices])

    def partners(self, seed: int) -> np.ndarray:
        """For each answer the number of one to another prompt, int64 [n]; a function of the data and the seed.

        It is the next in the order of the first epoch, so in this epoch a global batch is paired with its own answers,
        but for the one that follows it. An answer to the same prompt is passed over. Raises `UserError` where all have
        the same prompt.
        """
        order = SampleOrder(len(self), seed).permutation(0)
        numbers: dict[bytes, int] = {}
        prompts = np.array([numbers.setdefault(self._prompt_hash(int(i)), len(numbers)) for i in order])
        if len(numbers) < 2:
            raise UserError("all answers are to the same prompt, so none is mismatched; set kto.kl=false")
        ends = np.flatnonzero(prompts != np.roll(prompts, -1))  # another prompt follows
        own_end = ends[np.searchsorted(ends, np.arange(len(order))) % len(ends)]
        found = np.empty(len(order), np.int64)
        found[order] = order[(own_end + 1) % len(order)]
        return found

    def _joined(self, i: int, other: int) -> tuple[np.ndarray, np.ndarray]:
        (ids, trained), (other_ids, other_trained) = self.tokens(i), self.tokens(other)
        start, other_start = trained.argmax(), other_trained.argmax()
        joined = np.concatenate([ids[:start], other_ids[other_start:]])
        marks = np.concatenate([trained[:start], other_trained[other_start:]])
        return with_labels(joined[: self.max_length], marks[: self.max_length])

    def _prompt_hash(self, i: int) -> bytes:
        ids, trained = self.tokens(i)
        return hashlib.blake2b(ids[: trained.argmax()].tobytes(), digest_size=16).digest()


def prepare_labelled(
    sources: Sequence[str | os.PathLike],
    tokenizer,
    *,
    max_length: int,
    truncate: str = "right",
    cache: str | os.PathLike,
    name: str = "answers",
) -> LabelledAnswers:
    """The answers of these sources, see `ds_llm.data.answers.prepare`. Raises `UserError` when none is left."""
    folder = answers.prepare(
        sources, tokenizer, encode_row, kind="answers", max_length=max_length, truncate=truncate, cache=cache, name=name
    )
    found = LabelledAnswers(folder, tokenizer.pad_token_id, max_length)
    answers.announce(found, "labelled answer", name, sources)
    return found


def encode_row(row: dict, tokenizer) -> Sequence[Answer]:
    """The answers of a row, one or those of a pair. Raises `RowError` for a row that holds none or no sound label."""
    format = conversations.detect(row)
    if format == "preference":
        return pairs.encode_row(row, tokenizer)
    if format in (None, "text"):
        fields = ", ".join(map(str, row)) or "none"
        raise RowError("missing field", f"no prompt and completion, messages or pair; fields: {fields}"[:200])
    label = row.get("label")
    if label is None:
        raise RowError("no label", "label is null" if "label" in row else "the row has no label")
    if label not in (0, 1) or not isinstance(label, (bool, int)):
        raise RowError("bad label", f"label is {str(label)[:50]!r}, not true, false, 1 or 0")
    conversation = conversations.to_messages(row, format)
    completion = row["completion"] if format == "prompt_completion" else None
    last = len(completion) if isinstance(completion, list) else 1
    answer = pairs.encode_answer(tokenizer, conversation, len(conversation.messages) - last)
    return [Answer(answer, bool(label))]
