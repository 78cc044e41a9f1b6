"""Preference pairs as tokens: a chosen and a rejected answer to the same prompt, stored by `ds_llm.data.answers`.

A row has `chosen` and `rejected`, each a list of messages or a text, with or without `prompt`
(`ds_llm.data.conversations.to_pair`). Two texts without a prompt are taken as they are, without a chat template: what
both begin with, up to a white space, is the prompt.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ds_llm.data import answers, conversations
from ds_llm.data.answers import Answer, Answers
from ds_llm.data.chat import Encoded, find_answers, tokenise
from ds_llm.data.conversations import Conversation, RowError
from ds_llm.errors import UserError

if TYPE_CHECKING:
    import torch


class Pair(NamedTuple):
    """Two sequences: input_ids int64 [n], labels int64 [n] already shifted (-100 where nothing is learned)."""

    chosen: tuple[np.ndarray, np.ndarray]
    rejected: tuple[np.ndarray, np.ndarray]


class Pairs(Answers):
    """Stored pairs: `len()`, `pair(i)`, `batch(indices)`; `lengths` int64 [pairs, 2] in tokens. Answer 2 i is
    the chosen one of pair i, answer 2 i + 1 the rejected one."""

    def __init__(self, folder: Path, pad: int):
        super().__init__(folder, pad)
        self.lengths = self.lengths.reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.lengths)

    def pair(self, i: int) -> Pair:
        return Pair(self.sequence(2 * i), self.sequence(2 * i + 1))

    def describe(self) -> str:
        return self.report.describe(f"{len(self):,} pairs")

    def batch(self, indices) -> dict[str, torch.Tensor]:
        """P pairs as 2P padded rows, chosen answers first: `input_ids`, `labels`, `attention_mask` [2P, S] int64 and
        `index` [P], the numbers of the pairs."""
        import torch

        indices = np.asarray(indices, np.int64)
        pairs = [self.pair(int(i)) for i in indices]
        sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        return {**self.padded(sequences), "index": torch.from_numpy(indices)}


def prepare_pairs(
    sources: Sequence[str | os.PathLike],
    tokenizer,
    *,
    max_length: int,
    truncate: str = "right",
    cache: str | os.PathLike,
    name: str = "pairs",
) -> Pairs:
    """The pairs of these sources, see `ds_llm.data.answers.prepare`. Raises `UserError` when no pair is left."""
    folder = answers.prepare(
        sources, tokenizer, encode_row, kind="pairs", max_length=max_length, truncate=truncate, cache=cache, name=name
    )
    pairs = Pairs(folder, tokenizer.pad_token_id)
    answers.announce(pairs, "preference pair", name, sources)
    return pairs


def encode_row(row: dict, tokenizer) -> tuple[Answer, Answer]:
    """The answers of a row that holds a pair: the chosen one is desirable, the rejected one not. Raises `RowError`."""
    chosen, rejected = encode_pair(row, tokenizer)
    return Answer(chosen, True), Answer(rejected, False)


def encode_pair(row: dict, tokenizer) -> tuple[Encoded, Encoded]:
    """The chosen and the rejected conversation of a row as tokens; trained are the answers behind the common beginning.

    Raises `RowError` when the row is not a pair or where its answers lie cannot be told.
    """
    if not row.get("prompt") and isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str):
        return _encode_texts(row["chosen"], row["rejected"], tokenizer)
    chosen, rejected = conversations.to_pair(row)
    shared = _shared(chosen.messages, rejected.messages)
    return encode_answer(tokenizer, chosen, shared), encode_answer(tokenizer, rejected, shared)


def encode_answer(tokenizer, conversation: Conversation, prompt: int) -> Encoded:
    """A conversation as tokens; trained are the assistant's messages behind the first `prompt` messages.

    Raises `RowError` where there is none, or it cannot be told where they lie.
    """
    messages = conversation.messages
    text, spans = find_answers(tokenizer, *conversation)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    own = [s for s, i in zip(spans, answers, strict=True) if i >= prompt and messages[i].get("weight", 1)]
    if not own:
        raise RowError("no answer", "no message of the assistant follows the prompt")
    return tokenise(tokenizer, text, own)


def _shared(one, other) -> int:
    """How many items two sequences have in common from the front."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _encode_texts(chosen: str, rejected: str, tokenizer) -> tuple[Encoded, Encoded]:
    """Two plain texts; the end-of-text token behind each is part of the answer."""
    if chosen == rejected:
        raise RowError("same answers")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token to put behind a text; set its eos_token")
    shared = chosen[: _shared(chosen, rejected)]
    # back to the end of a word, so that the tokens of the prompt are those of the prompt alone
    shared = shared[: max((i for i, c in enumerate(shared) if c.isspace()), default=0)].rstrip()
    sides = []
    for text in (chosen, rejected):
        prompt = tokenizer(shared, split_special_tokens=True, verbose=False)["input_ids"]
        if prompt and prompt[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
            prompt = prompt[:-1]
        rest = text[len(shared) :]
        answer = tokenizer(rest, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        sides.append(Encoded(prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    return sides[0], sides[1]
