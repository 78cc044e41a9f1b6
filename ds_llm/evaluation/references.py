"""Prompts with a reference answer each, from rows of prompt and completion, chats, instructions or preferences."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ds_llm.data import chat, conversations
from ds_llm.data.conversations import RowError
from ds_llm.data.rows import Reject, records
from ds_llm.data.sources import Source, resolve
from ds_llm.data.supervised import find_format
from ds_llm.errors import UserError

FORMATS = ("messages", "prompt_completion", "alpaca", "preference")
NAMED = 5  # places named per reason


@dataclass
class References:
    """Equally many `prompts` as text, their tokens `ids`, and `answers`, the texts to compare with.

    `rejected` lists (file, line or row number, reason) of the rows read that cannot be used; `longer` counts the
    answers that have more tokens than are generated.
    """

    prompts: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    rejected: list[tuple[str, int, str]] = field(default_factory=list)
    longer: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def describe(self) -> str:
        """The counts in one line."""
        line = f"{len(self):,} prompts with references"
        if self.longer:
            line += f", {self.longer:,} of them longer than what is generated"
        return line + (f"; left out: {self.reasons()}" if self.rejected else "")

    def reasons(self) -> str:
        """Why rows were left out, with the first places."""
        counts, parts = Counter(reason.split(" (")[0] for *_, reason in self.rejected), []
        for reason, count in counts.most_common():
            places = [f"{file}:{row}" for file, row, why in self.rejected if why.split(" (")[0] == reason]
            parts.append(f"{count:,} {reason} ({', '.join(places[:NAMED])}{', …' if count > NAMED else ''})")
        return ", ".join(parts)


def read_references(
    names: Sequence[str | os.PathLike],
    tokenizer,
    *,
    max_new_tokens: int,
    positions: int | None,
    rows: int = 0,
    where: str = "data",
) -> References:
    """The first `rows` (0: all) usable rows of files, folders, globs or hub data sets, in their order.

    The last thing that the assistant says in a row is its reference and all before it the prompt, rendered by the chat
    template; of a preference row it is the chosen answer. Without a template, a prompt in plain text (`prompt`, or
    `instruction` and `input`) is continued as it is. Rows that leave no room for `max_new_tokens` within the model's
    `positions` cannot be used: all rows are answered in equal length.

    Raises `UserError`, which begins with `where`, for a source without prompts and references or without usable rows.
    """
    for name in names:
        if str(name).endswith(".bin"):
            raise UserError(f"{where}: {name}: a token file has no prompts and references; name a file of such rows")
    found = References()
    for source, format in _formats(resolve(names), where):
        if not tokenizer.chat_template and format not in ("prompt_completion", "alpaca"):
            chat.check_template(tokenizer)
        for file, number, row in _rows(source):
            if rows and len(found) == rows:
                return found
            try:
                if isinstance(row, Reject):
                    raise RowError(row.reason, row.detail)
                prompt, answer = _split(tokenizer, row, format)
                plain = not tokenizer.chat_template
                ids = tokenizer(prompt, add_special_tokens=plain, verbose=False)["input_ids"]
                if positions and len(ids) + max_new_tokens > positions:
                    raise RowError("too long", f"{len(ids):,} tokens and {max_new_tokens:,} to be generated")
            except RowError as error:
                found.rejected.append((file, number, str(error)))
                continue
            found.prompts.append(prompt)
            found.ids.append(list(ids))
            found.answers.append(answer)
            length = len(tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"])
            found.longer += length > max_new_tokens
    if not found:
        why = f": {found.reasons()}" if found.rejected else ", it holds no rows"
        raise UserError(f"{where}: {', '.join(map(str, names))}: no usable prompt with a reference{why}")
    return found


def _formats(sources: list[Source], where: str) -> list[tuple[Source, str]]:
    found = []
    for source in sources:
        format = find_format(source, (*FORMATS, "text"))
        if format == "text":
            raise UserError(
                f"{where}: {source.name}: rows of text have no prompts and references; name a file of rows with "
                "messages, or prompt and completion"
            )
        found.append((source, format))
    return found


def _rows(source: Source) -> Iterator[tuple[str, int, dict | Reject]]:
    for file, batch in source.batches():
        for record in records(batch):
            yield (file, record.number, record) if isinstance(record, Reject) else (file, *record)


def _split(tokenizer, row: dict, format: str) -> tuple[str, str]:
    """(prompt as text, reference) of a row. Raises `RowError`."""
    found = conversations.to_pair(row)[0] if format == "preference" else conversations.to_messages(row, format)
    messages, tools, columns = found
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant" and m["content"].strip()), default=0)
    if not last:
        raise RowError("no answer in words", f"roles are {', '.join(m['role'] for m in messages)}")
    before, answer = messages[:last], messages[last]["content"]
    if tokenizer.chat_template:
        context = chat.context_of(tokenizer, tools, columns)
        return chat.render(tokenizer, before, context, add_generation_prompt=True), answer
    if len(before) > 1 or (format == "prompt_completion" and not isinstance(row["prompt"], str)):
        raise RowError("needs a chat template", "the tokenizer has none")
    return before[0]["content"], answer
