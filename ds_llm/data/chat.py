"""Conversations as tokens, with a mask of the assistant's answers, for any chat template.

A template is a program, so this module finds the answers by experiment on the rendered text. It renders the
conversation as it is, and once more for each answer with that answer replaced by a marker. The answer is where the two
texts differ, and nothing else may differ. The generation prompt shows the header before an answer, and the text behind
it shows the token that ends the turn. So templates that rewrite earlier turns, trim, or insert a system message or a
date need no special case. Templates with `{% generation %}` mark the answers themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from jinja2.meta import find_undeclared_variables

from ds_llm.data.conversations import RowError
from ds_llm.errors import UserError

TRAIN_ON = ("all", "last")
REASONS = {
    "refused by the chat template": "the template raises an error for these messages",
    "no answer": "no message of the assistant",
    "not in the template": "a question, system message, tools or reasoning that the chat template would leave out",
    "control token": "a text spells a token that begins or ends a turn",
    "answer not found": "which part of the rendered text the assistant says cannot be determined",
    "no end of turn": "the template puts no end-of-turn token behind an answer",
}
# what transformers passes to every template; `tools` and `messages` have places of their own
GIVEN = {"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now", "range", "namespace"}
GIVEN |= {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
REASONING = ("reasoning_content", "thinking", "reasoning")  # what messages and templates call it
_MARK = "\ue000\ue001\ue002"  # private-use characters: neither a template nor a text holds them in a row


class Unmaskable(RowError):
    """A conversation whose answers cannot be found in the rendered text; `reason` is a key of REASONS."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """input_ids [n]; trained [n]: whether token i carries loss when it is predicted (not shifted)."""

    input_ids: list[int]
    trained: list[bool]


@dataclass(frozen=True, slots=True)
class _Template:
    """A chat template: its text, the header before an answer, the end of a turn ("" if none), special tokens."""

    text: str
    header: str
    ender: str
    special: re.Pattern
    longest: int  # characters of a special token


def encode(
    tokenizer,
    messages: list[dict],
    tools: list[dict] | None = None,
    columns: Mapping | None = None,
    *,
    train_on: str = "all",
) -> Encoded:
    """Tokens of a conversation as the chat template renders it; trained are the answers.

    messages: dicts with `role` and `content` (text), in assistant messages also `tool_calls`; tools: JSON schemas.
    columns: other values of the row, of which the template gets those that it names (`variables`). An
    answer is trained from behind its header through its end-of-turn token; a white space behind that is not. train_on:
    every answer ("all") or only the last one ("last"), in either case without those of `weight` 0. A token that
    straddles the beginning of an answer is trained.

    The ids are those of `tokenizer.apply_chat_template(messages, tools=tools)`. Raises `Unmaskable` when an answer's
    place cannot be determined, `UserError` when the tokenizer has no chat template.
    """
    text, spans = find_answers(tokenizer, messages, tools, columns)
    answers = [message for message in messages if message["role"] == "assistant"]
    wanted = [span for span, answer in zip(spans, answers, strict=True) if answer.get("weight", 1)]
    return tokenise(tokenizer, text, wanted if train_on == "all" else [span for span in wanted if span == spans[-1]])


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
    try:
        _template(tokenizer, _text_of(tokenizer))
    except Unmaskable as error:
        raise UserError(f"{tokenizer.name_or_path or 'the tokenizer'}: chat template of no use here: {error}") from None


def _text_of(tokenizer, tools: list[dict] | None = None) -> str:
    """The text of the template for these tools. Raises `UserError` where there is none."""
    name, own = tokenizer.name_or_path or "the tokenizer", tokenizer.chat_template
    if not own:
        raise UserError(
            f"{name}: has no chat template, which conversations need; name one for a training, such as "
            "data.chat_template=chatml, or put a chat_template.jinja into its folder"
        )
    if isinstance(own, dict) and "default" not in own and not (tools and "tool_use" in own):
        raise UserError(
            f"{name}: has the chat templates {', '.join(own)} and none called default; choose one, for example "
            f"data.chat_template={next(iter(own))}"
        )
    return tokenizer.get_chat_template(tools=tools)


def end_of_turn(tokenizer) -> str:
    """The special tokens that the chat template writes behind an answer; "" where there are none.

    Raises `UserError` or `Unmaskable` for a template that renders no plain question and answer.
    """
    return _template(tokenizer, _text_of(tokenizer)).ender


def context_of(tokenizer, tools: list[dict] | None = None, columns: Mapping | None = None) -> dict:
    """What the chat template gets beside the messages: tools, and of the columns of a row those that it names."""
    taken = variables(_text_of(tokenizer, tools)) & columns.keys() if columns else ()
    return {name: columns[name] for name in sorted(taken)} | ({"tools": tools} if tools else {})


@lru_cache(maxsize=16)
def variables(template: str) -> frozenset[str]:
    """Names that a chat template reads and does not set, without those that the library or a tokenizer gives it."""
    from ds_llm.compat.transformers import _compile_jinja_template

    environment = _compile_jinja_template(template).environment
    return frozenset(find_undeclared_variables(environment.parse(template))) - GIVEN


def render(tokenizer, messages: list[dict], context: Mapping | None = None, **options) -> str:
    """The conversation as text by `apply_chat_template` and its options. `Unmaskable` when the template refuses it.

    context: of `context_of`.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **(context or {}), **options)
    except Exception as error:  # whatever a template raises speaks of the messages
        raise Unmaskable("refused by the chat template", str(error).strip() or type(error).__name__) from None


def find_answers(
    tokenizer, messages: list[dict], tools: list[dict] | None = None, columns: Mapping | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and [start, end) of each answer in its characters, in order. columns: see `encode`."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise Unmaskable("no answer", f"roles are {', '.join(m['role'] for m in messages) or 'none'}")
    template = _template(tokenizer, _text_of(tokenizer, tools))
    context = context_of(tokenizer, tools, columns)
    _check_contents(template, messages, context)
    text = render(tokenizer, messages, context)
    for number, message in enumerate(messages, 1):
        if message["role"] in ("system", "developer", "user") and message["content"].strip() not in text:
            raise Unmaskable("not in the template", f"message {number} ({message['role']}) does not show as it is")
    spans = _marked_spans(tokenizer, template, messages, context)
    if len(spans) == len(answers):
        spans = [_whole_turn(template, text, start, end, i) for (start, end), i in zip(spans, answers, strict=True)]
    else:
        spans, done = [], 0
        for i in answers:
            spans.append(_locate(tokenizer, template, messages, context, text, i, done))
            done = spans[-1][1]
    if any(a[1] > b[0] for a, b in pairwise(spans)):
        raise Unmaskable("answer not found", "the places of two answers overlap")
    return text, spans


@lru_cache(maxsize=16)
def _template(tokenizer, text: str) -> _Template:
    """The template's header and end of turn, from a plain question and answer."""
    question = {"role": "user", "content": _MARK}
    without = render(tokenizer, [question], chat_template=text)
    header = render(tokenizer, [question], chat_template=text, add_generation_prompt=True)
    header = header[_common(without, header) :]
    answer = {"role": "assistant", "content": _MARK}
    tail = render(tokenizer, [{"role": "user", "content": "a"}, answer], chat_template=text)
    if _MARK in header:
        raise Unmaskable("answer not found", "the template renders the same messages differently each time")
    if tail.count(_MARK) != 1:
        raise Unmaskable("answer not found", "the template does not show an answer once, as it is")
    tail = tail.partition(_MARK)[2]
    tokens = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in tokens if token.special} | set(tokenizer.all_special_tokens)
    longest = max(map(len, special), default=0)
    first = _any_of(special).search(tail) or _any_of({token.content for token in tokens}).search(tail)
    if first is None:
        return _Template(text, header, "", _any_of(special), longest)
    pattern, end = _any_of({*special, first[0]}), first.end()
    while follows := pattern.match(tail, end):  # some turns end with two tokens
        end = follows.end()
    return _Template(text, header, tail[first.start() : end], pattern, max(longest, len(first[0])))


def _any_of(tokens: set[str]) -> re.Pattern:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _common(a: str, b: str) -> int:
    """Length of the common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _check_contents(template: _Template, messages: list[dict], context: Mapping) -> None:
    used = {"tools"} & context.keys()
    used |= {"tool_calls" for message in messages if message.get("tool_calls")}
    used |= {"reasoning" for message in messages if any(message.get(name) for name in REASONING)}
    for name in sorted(used):
        words = "|".join(REASONING) if name == "reasoning" else name
        if not re.search(rf"\b({words})\b", template.text):
            raise Unmaskable("not in the template", f"the template does not mention {name}")
    control = {*template.special.findall(template.header), *template.special.findall(template.ender)}
    for number, message in enumerate(messages, 1):
        content = json.dumps(message, ensure_ascii=False, default=str)
        for token in control:
            if token in content:
                raise Unmaskable("control token", f"message {number} spells {token}")


def _marked_spans(tokenizer, template: _Template, messages, context) -> list[tuple[int, int]]:
    """The spans that the template marks by `{% generation %}`, without the header."""
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template.text):
        return []
    from ds_llm.compat.transformers import render_jinja_template

    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    texts, spans = render_jinja_template(
        [messages],
        **context,
        chat_template=template.text,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return [(_after(texts[0], template.header, start), end) for start, end in spans[0]]


def _after(text: str, header: str, start: int) -> int:
    """`start`, or the end of the header where `start` lies in one."""
    at = text.rfind(header, max(0, start - len(header)), start + len(header)) if header else -1
    return start if at < 0 else at + len(header)


def _whole_turn(template: _Template, text: str, start: int, end: int, i: int) -> tuple[int, int]:
    """A span that the template marks, cut behind its end-of-turn token or extended to include it.

    In a template whose turns end without a token the span stays as marked.
    """
    inside = list(template.special.finditer(text, start, end))
    if inside and not text[inside[-1].end() : end].strip():
        return start, inside[-1].end()
    if not template.ender:
        return start, end
    following = template.special.search(text, end)
    if following and not text[end : following.start()].strip() and text.startswith(template.ender, following.start()):
        return start, following.start() + len(template.ender)
    raise Unmaskable("no end of turn", f"after message {i + 1}")


def _locate(tokenizer, template: _Template, messages, context, text: str, i: int, done: int) -> tuple[int, int]:
    """[start, end) in `text` of the assistant's message i; the answer before it ends at `done`."""
    problem = Unmaskable("answer not found", f"message {i + 1} does not show in the rendered text")
    for changed in _changes(messages[i]):
        try:
            other = render(tokenizer, [*messages[:i], changed, *messages[i + 1 :]], context)
            if _MARK not in other:
                continue
            content, end = _difference(template, text, other, f"message {i + 1}")
            start = _behind_header(tokenizer, template, messages, context, text, i, done, content)
            if start == content and changed.get("tool_calls"):  # the marker is only in the arguments
                start = _behind_before(tokenizer, template, messages, context, text, i)
            if start < done:
                raise Unmaskable("answer not found", f"message {i + 1} changes what is rendered before it")
            return start, _turn_end(tokenizer, template, messages, context, text, i, end)
        except Unmaskable as error:
            problem = error
    raise problem


def _changes(message: dict) -> list[dict]:
    """Variants of the message with a marker for its content: as plain text, or in the arguments of its tool calls."""
    plain = {"role": message["role"], "content": _MARK}
    if not message.get("tool_calls"):
        return [plain]
    calls = [
        {**call, "function": {**call.get("function", {}), "arguments": {_MARK: _MARK}}}
        for call in message["tool_calls"]
    ]
    return [plain, {**plain, "tool_calls": calls}, {**message, "tool_calls": calls}]


def _behind_header(tokenizer, template: _Template, messages, context, text, i: int, done: int, content: int) -> int:
    """Start of the answer whose content begins at `content`: there, or earlier, where its header ends."""
    at = text.rfind(template.header, done, content) if template.header else -1
    start = content if at < 0 else at + len(template.header)
    if start < content and i and messages[i - 1]["role"] != "assistant":
        # the header is not next to the content: make sure that it is no part of the message before
        marked = {**messages[i - 1], "content": _MARK}
        other = render(tokenizer, [*messages[: i - 1], marked, *messages[i:]], context)
        if _MARK in other and _difference(template, text, other, f"message {i}")[1] > at:
            return content
    return start


def _behind_before(tokenizer, template: _Template, messages, context, text: str, i: int) -> int:
    """Start of message i in `text`: behind the earlier messages and the part of the header that follows them."""
    before = render(tokenizer, messages[:i], context) if i else ""
    if not text.startswith(before):
        raise Unmaskable("answer not found", f"message {i + 1} has no header, and changes what is rendered before it")
    return len(before) + _common(template.header, text[len(before) :])


def _difference(template: _Template, text: str, other: str, name: str) -> tuple[int, int]:
    """[start, end) of the part of `text` that differs from `other`, which has a marker in one message.

    Does not cut special tokens in two. Raises `Unmaskable` where other parts differ too, such as the time of day.
    """
    start, rest = _common(text, other), _common(text[::-1], other[::-1])
    before, _, after = other[start : len(other) - rest].partition(_MARK)
    after = after.rpartition(_MARK)[2]
    began = template.header in before if template.header else template.special.search(before)
    if began or (template.ender and template.ender in after):
        raise Unmaskable("answer not found", f"more than {name} changes when it does")
    end = len(text) - rest
    for match in template.special.finditer(text, max(0, start - template.longest), end + template.longest):
        if match.start() < start < match.end():
            start = match.start()
        if match.start() < end < match.end():
            end = match.start()
    return min(start, end), end


def _turn_end(tokenizer, template: _Template, messages, context, text: str, i: int, end: int) -> int:
    """End of the end-of-turn token behind message i, whose content ends at `end`."""
    found = template.special.search(text, end)
    if found is None:
        raise Unmaskable("no end of turn", f"after message {i + 1}")
    gap, ender = text[end : found.start()], found[0]
    if template.ender and not gap.strip() and text.startswith(template.ender, found.start()):
        return found.start() + len(template.ender)
    # another token than behind a plain answer: it must end the conversation when that ends here, ...
    if render(tokenizer, messages[: i + 1], context).rstrip().endswith(gap + ender):
        return found.end()
    # ... or, where the last turn ends with a token of its own, end the message before as well
    if i and not gap.strip() and render(tokenizer, messages[:i], context).rstrip().endswith(ender):
        return found.end()
    raise Unmaskable("no end of turn", f"message {i + 1} is followed by {text[end : found.end()]!r}"[:200])


def tokenise(tokenizer, text: str, spans: list[tuple[int, int]]) -> Encoded:
    """Tokens of a rendered text, without added special tokens. Every token with a character of a span is trained."""
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
    """`tokenise` for tokenizers without offsets: the tokens of each prefix must be a prefix of all tokens."""
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
