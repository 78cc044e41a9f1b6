"""Prompts from a file, or from a person at a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from ds_llm.data.rows import load_json
from ds_llm.errors import UserError
from ds_llm.generation.generator import Completion, Generator, Prompt
from ds_llm.generation.sampling import SamplingParams, one_answer
from ds_llm.progress import progress

LEAVE = ("exit", "quit", "q")
SHOWN = 5  # bad rows named on stderr; the output names them all


@dataclass
class Row:
    """A prompt of a file: its line number from 1, its row's fields, and its error, if any."""

    line: int
    values: dict = field(default_factory=dict)
    prompt: Prompt | list[int] | None = None
    error: str | None = None


def conversation(text: str, system: str | None) -> list[dict]:
    """A first question as messages."""
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": text}]


def read_rows(path: str, chat: bool = False, system: str | None = None) -> Iterator[Row]:
    """The prompts of a file: the lines of a .txt that are not blank, or the rows of a .jsonl.

    A JSON row holds `prompt` (text) or `messages` (a conversation). `chat` makes a conversation of a text; `system` is
    put in front of every conversation that has no system message.
    """
    file = Path(path)
    if file.suffix not in (".jsonl", ".txt"):
        raise UserError(f"{path}: a file of prompts ends with .jsonl or .txt")
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        row = Row(number)
        try:
            text = raw.decode("utf-8-sig")
            row.values = {"prompt": text} if file.suffix == ".txt" else _parse(text)
            row.prompt = _prompt(row.values, chat, system)
        except UnicodeDecodeError:
            row.error = "not UTF-8"
        except UserError as error:
            row.error = str(error)
        yield row


def _parse(text: str) -> dict:
    try:
        values = load_json(text)
    except ValueError as error:
        raise UserError(f"not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError("not a JSON object")
    return values


def _prompt(values: dict, chat: bool, system: str | None) -> Prompt:
    if isinstance(values.get("messages"), list):
        messages = values["messages"]
        roles = [message.get("role") for message in messages if isinstance(message, dict)]
        return [{"role": "system", "content": system}, *messages] if system and "system" not in roles else messages
    if not isinstance(values.get("prompt"), str):
        raise UserError("no text in the field 'prompt' and no list in 'messages'")
    return conversation(values["prompt"], system) if chat else values["prompt"]


def complete_file(
    generator: Generator,
    path: str,
    params: SamplingParams,
    output: str | None = None,
    chat: bool = False,
    system: str | None = None,
    batch_size: int = 8,
) -> None:
    """Complete every prompt of a file into JSON lines, in the file's order, on stdout or in `output`.

    A row of the result has the fields of its prompt's row, then `completion`, `finish_reason` and `tokens` (new ones),
    and `sample` where there are several per prompt. For a row that cannot be used it has `line` and `error`; such rows
    are counted and the first of them named on stderr. Raises `UserError` when no row can be used.
    """
    rows = list(read_rows(path, chat, system))
    for row in rows:
        if row.error is None:
            try:
                row.prompt = generator.encode(row.prompt)
            except UserError as error:
                row.error = str(error)
    usable = [row for row in rows if row.error is None]
    if not usable:
        raise UserError(f"{path}: no usable prompt{f'; line {rows[0].line}: {rows[0].error}' if rows else ''}")
    if output and Path(output).resolve() == Path(path).resolve():
        raise UserError(f"{output}: is the file of prompts itself; name another output")
    completions = generator.complete([row.prompt for row in usable], params, batch_size)
    try:
        with (
            open(output, "w", encoding="utf-8") if output else nullcontext(sys.stdout) as file,
            progress("generating", len(usable), "prompts") if output else nullcontext() as task,
        ):
            for row in rows:
                found = _failure(row) if row.error else _results(row, next(completions))
                file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in found)
                file.flush()
                if task and not row.error:
                    task.advance()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None
    bad = [row for row in rows if row.error]
    for row in bad[:SHOWN]:
        print(f"warning: {path}, line {row.line}: {row.error}", file=sys.stderr)
    if bad:
        print(f"warning: {len(bad)} of {len(rows)} rows could not be used", file=sys.stderr)


def _failure(row: Row) -> list[dict]:
    return [{"line": row.line, "error": row.error}]


def _results(row: Row, completions: list[Completion]) -> list[dict]:
    found = []
    for number, one in enumerate(completions):
        sample = {"sample": number} if len(completions) > 1 else {}
        made = {"completion": one.text, "finish_reason": one.finish_reason, "tokens": len(one.token_ids)}
        found.append(row.values | sample | made)
    return found


def converse(generator: Generator, params: SamplingParams, chat: bool = False, system: str | None = None) -> None:
    """Answer the lines a person types, until exit, quit, q or the end of the input.

    In a chat the conversation is kept, and its oldest turns are dropped when the model's context is full; `clear`
    forgets it. Otherwise every line is a text of its own to continue. Ctrl-C ends an answer.
    """
    one_answer(params, {}, streams=True)
    kind = "chat; clear forgets the conversation" if chat else "each line is continued on its own"
    print(f"{kind}; exit, quit or q leaves", flush=True)
    opening = conversation("", system)[:-1]
    turns: list[dict] = []
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print(flush=True)
            return
        command = line.strip().lower()
        if command in LEAVE:
            return
        if command == "clear":
            turns = []
            print("cleared", flush=True)
            continue
        if not command:
            continue
        try:
            if chat:
                kept = _fitting(generator, opening, [*turns, {"role": "user", "content": line}])
                turns = [*kept, {"role": "assistant", "content": _answer(generator, [*opening, *kept], params)}]
            else:
                _answer(generator, line, params)
        except UserError as error:
            print(f"error: {error}", flush=True)


def _fitting(generator: Generator, opening: list[dict], turns: list[dict]) -> list[dict]:
    """As many of the last turns as the context holds, without the oldest questions and answers."""
    for start in range(0, len(turns), 2):
        try:
            generator.encode([*opening, *turns[start:]])
        except UserError:
            if start + 1 >= len(turns):
                raise
            continue
        if start:
            print(f"(the {start} oldest messages no longer fit and are forgotten)", flush=True)
        return turns[start:]
    raise AssertionError  # the last turn is a question, so the loop returns or raises


def _answer(generator: Generator, prompt: Prompt, params: SamplingParams) -> str:
    pieces: list[str] = []
    with closing(generator.stream(prompt, params)) as stream:
        try:
            for piece in stream:
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" ...", end="")
    print(flush=True)
    return "".join(pieces)
