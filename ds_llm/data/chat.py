"""Conversations as tokens, and which of them the assistant says, for any chat template.

A template is a program, so the turns are found by experiment, on text: the conversation is rendered once as it is, and
once more for each answer with that answer replaced by a marker. Where the two texts differ lies the answer, and nothing
else may differ; what the template puts before it is known from its generation prompt, and the token that ends the turn
from what follows. Templates that rewrite earlier turns, trim, insert a system message or a date therefore need no
special case. Templates with `{% generation %}` say themselves where the answers are.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from ds_llm.data.conversations import RowError
from ds_llm.errors import UserError

TRAIN_ON = ("all", "last")
REASONS = {
    "refused by the chat template": "the template raises an error for these messages",
    "no answer": "no message of the assistant",
    "tools not in the template": "tools or tool calls that the chat template would leave out",
    "control token": "a text spells a token that begins or ends a turn",
    "answer not found": "which part of the rendered text the assistant says cannot be determined",
    "no end of turn": "the template puts no end-of-turn token behind an answer",
}
_MARK = "\ue000\ue001\ue002"  # private-use characters: neither a template nor a text holds them in a row


class Unmaskable(RowError):
    """A conversation for which it cannot be told which tokens the assistant says; `reason` is a key of REASONS."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """input_ids [n], and trained [n]: whether token i carries loss (as the token to predict, not shifted)."""

    input_ids: list[int]
    trained: list[bool]


@dataclass(frozen=True, slots=True)
class _Template:
    """A chat template: its text, what it puts before an answer, the tokens that end a turn, all special tokens."""

    text: str
    header: str
    enders: frozenset[str]
    special: re.Pattern


def encode(tokenizer, messages: list[dict], tools: list[dict] | None = None, *, train_on: str = "all") -> Encoded:
    """Tokens of a conversation as the chat template renders it; trained are the answers.

    messages: dicts with `role` and `content` (text), in assistant messages also `tool_calls`; tools: JSON schemas. An
    answer is trained from behind its header through its end-of-turn token; a white space behind that is not. train_on:
    every answer ("all") or only the last one ("last"). A token that straddles the beginning of an answer is trained.

    The ids are those of `tokenizer.apply_chat_template(messages, tools=tools)`. Raises `Unmaskable` when an answer's
    place cannot be determined, `UserError` when the tokenizer has no chat template.
    """
    text, spans = find_answers(tokenizer, messages, tools)
    return tokenise(tokenizer, text, spans if train_on == "all" else spans[-1:])


def encode_text(tokenizer, text: str) -> Encoded:
    """Tokens of a plain text, all of them trained, with the special tokens the tokenizer adds and an end-of-text token.

    Text that spells a special token is encoded as the text that it is.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token to put behind a text; set its eos_token")
    ids = tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return Encoded(ids, [True] * len(ids))


def check_template(tokenizer) -> None:
    """Raise `UserError` when the tokenizer has no chat template, or one that renders no plain question and answer."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: has no chat template, which conversations need; take the "
            "tokenizer of an instruction-tuned model, or put a chat_template.jinja into its folder"
        )
    try:
        _template(tokenizer, tokenizer.get_chat_template())
    except Unmaskable as error:
        raise UserError(f"{tokenizer.name_or_path or 'the tokenizer'}: chat template of no use here: {error}") from None


def render(tokenizer, messages: list[dict], tools: list[dict] | None = None, prompt: bool = False) -> str:
    """The conversation as text; with `prompt` also the header of the answer to come. `Unmaskable` when refused."""
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # whatever a template raises speaks of the messages
        raise Unmaskable("refused by the chat template", str(error).strip() or type(error).__name__) from None


def find_answers(tokenizer, messages: list[dict], tools: list[dict] | None = None) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and [start, end) of each answer in its characters, in order."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise Unmaskable("no answer", f"roles are {', '.join(m['role'] for m in messages) or 'none'}")
    if not tokenizer.chat_template:
        check_template(tokenizer)
    template = _template(tokenizer, tokenizer.get_chat_template(tools=tools))
    _check_contents(template, messages, tools)
    text = render(tokenizer, messages, tools)
    spans = _marked_spans(tokenizer, template, messages, tools)
    if len(spans) == len(answers):
        spans = [_whole_turn(template, text, start, end, i) for (start, end), i in zip(spans, answers, strict=True)]
    else:
        spans, done = [], 0
        for i in answers:
            spans.append(_locate(tokenizer, template, messages, tools, text, i, done))
            done = spans[-1][1]
    if any(a[1] > b[0] for a, b in pairwise(spans)):
        raise Unmaskable("answer not found", "the places of two answers overlap")
    return text, spans


@lru_cache(maxsize=16)
def _template(tokenizer, text: str) -> _Template:
    """What a plain question and answer show of the template."""
    question = {"role": "user", "content": _MARK}
    without, header = render(tokenizer, [question]), render(tokenizer, [question], prompt=True)
    header = header[_common(without, header) :]
    tail = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}])
    if tail.count(_MARK) != 1:
        raise Unmaskable("answer not found", "the template does not show an answer once, as it is")
    tail = tail.partition(_MARK)[2]
    tokens = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in tokens if token.special} | set(tokenizer.all_special_tokens)
    ender = _any_of(special).search(tail) or _any_of({token.content for token in tokens}).search(tail)
    enders = {ender[0]} if ender else set()
    return _Template(text, header, frozenset(enders), _any_of(special | enders))


def _any_of(tokens: set[str]) -> re.Pattern:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _common(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _check_contents(template: _Template, messages: list[dict], tools: list[dict] | None) -> None:
    calls = any(message.get("tool_calls") for message in messages)
    for used, name in ((tools, "tools"), (calls, "tool_calls")):
        if used and name not in template.text:
            raise Unmaskable("tools not in the template", f"the template does not mention {name}")
    control = template.enders.union(template.special.findall(template.header))
    for number, message in enumerate(messages, 1):
        content = json.dumps(message, ensure_ascii=False, default=str)
        for token in control:
            if token in content:
                raise Unmaskable("control token", f"message {number} spells {token}")


def _marked_spans(tokenizer, template: _Template, messages, tools) -> list[tuple[int, int]]:
    """What the template itself marks by `{% generation %}`, without the header."""
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template.text):
        return []
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    texts, spans = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=template.text,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    header = template.header
    return [(a + len(header) if header and texts[0].startswith(header, a) else a, b) for a, b in spans[0]]


def _whole_turn(template: _Template, text: str, start: int, end: int, i: int) -> tuple[int, int]:
    """A span that the template marks, cut behind its end-of-turn token, or extended through the one that follows."""
    inside = list(template.special.finditer(text, start, end))
    if inside and not text[inside[-1].end() : end].strip():
        return start, inside[-1].end()
    following = template.special.search(text, end)
    if following and following[0] in template.enders and not text[end : following.start()].strip():
        return start, following.end()
    raise Unmaskable("no end of turn", f"after message {i + 1}")


def _locate(tokenizer, template: _Template, messages, tools, text: str, i: int, done: int) -> tuple[int, int]:
    """[start, end) in `text` of what the assistant says in message i; the answer before it ends at `done`."""
    for changed in _changes(messages[i]):
        try:
            other = render(tokenizer, [*messages[:i], changed, *messages[i + 1 :]], tools)
        except Unmaskable:
            continue
        if _MARK in other:
            break
    else:
        raise Unmaskable("answer not found", f"message {i + 1} does not show in the rendered text")
    content, end = _difference(template, text, other)
    start = text.rfind(template.header, done, content) if template.header else -1
    start = content if start < 0 else start + len(template.header)
    if start < content and i and messages[i - 1]["role"] != "assistant":
        # the header is not next to the content: make sure that it is no part of the message before
        marked = {**messages[i - 1], "content": _MARK}
        other = render(tokenizer, [*messages[: i - 1], marked, *messages[i:]], tools)
        if _MARK in other and _difference(template, text, other)[1] > start:
            start = content
    if start < done:
        raise Unmaskable("answer not found", f"message {i + 1} changes what is rendered before it")
    ender = template.special.search(text, end)
    if ender is None:
        raise Unmaskable("no end of turn", f"after message {i + 1}")
    if not _ends_turn(tokenizer, template, messages, tools, i, text[end : ender.start()], ender[0]):
        raise Unmaskable("no end of turn", f"message {i + 1} is followed by {text[end : ender.end()]!r}"[:200])
    return start, ender.end()


def _changes(message: dict) -> list[dict]:
    """The message with a marker in place of what it says: as plain text, or inside its tool calls."""
    plain = {"role": message["role"], "content": _MARK}
    if not message.get("tool_calls"):
        return [plain]
    calls = [
        {**call, "function": {**call.get("function", {}), "name": _MARK, "arguments": {_MARK: _MARK}}}
        for call in message["tool_calls"]
    ]
    return [plain, {**plain, "tool_calls": calls}, {**message, "tool_calls": calls}]


def _difference(template: _Template, text: str, other: str) -> tuple[int, int]:
    """[start, end) of the part of `text` that differs in `other`, cutting no special token in two."""
    start, end = _common(text, other), len(text) - _common(text[::-1], other[::-1])
    for match in template.special.finditer(text):
        if match.start() < start < match.end():
            start = match.start()
        if match.start() < end < match.end():
            end = match.start()
    return min(start, end), end


def _ends_turn(tokenizer, template: _Template, messages, tools, i: int, gap: str, ender: str) -> bool:
    """Whether the token `ender`, found `gap` behind the content of message i, belongs to that message."""
    if not gap.strip() and ender in template.enders:
        return True
    if render(tokenizer, messages[: i + 1], tools).rstrip().endswith(gap + ender):
        return True
    if gap.strip() or not i:
        return False
    # a template may end the last turn by a token of its own; then the message before ends with this one as well
    tail = render(tokenizer, [*messages[: i - 1], {**messages[i - 1], "content": _MARK}], tools)
    return tail.rpartition(_MARK)[2].lstrip().startswith(ender)


def tokenise(tokenizer, text: str, spans: list[tuple[int, int]]) -> Encoded:
    """Tokens of a rendered text; trained is every token that holds a character of a span. No special token is added."""
    if not tokenizer.is_fast:
        return _tokenise_stepwise(tokenizer, text, spans)
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.array(out["offset_mapping"], np.int64).reshape(-1, 2)
    high = np.maximum.accumulate(offsets[:, 1])
    low = np.minimum(offsets[:, 0], np.append(0, high[:-1]))  # offsets may leave out the white space before a token
    trained = np.zeros(len(offsets), bool)
    for start, end in spans:
        trained |= (low < end) & (high > start) & (high > low)
    return Encoded(out["input_ids"], trained.tolist())


def _tokenise_stepwise(tokenizer, text: str, spans: list[tuple[int, int]]) -> Encoded:
    """The same for tokenizers without offsets: the tokens of the text up to each boundary must begin the whole's."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    trained = [False] * len(ids)
    for span in spans:
        counts = []
        for at in span:
            part = tokenizer(text[:at], add_special_tokens=False, verbose=False)["input_ids"]
            if ids[: len(part)] != part:
                raise Unmaskable("answer not found", "a token lies across the beginning or the end of an answer")
            counts.append(len(part))
        trained[counts[0] : counts[1]] = [True] * (counts[1] - counts[0])
    return Encoded(ids, trained)
