"""Rows of the usual formats as conversations.

| format | fields of a row |
| --- | --- |
| messages | `messages` or `conversations`: a list of `{"role", "content"}` or `{"from", "value"}`; `tools`, `system` |
| prompt_completion | `prompt` and `completion`: each a text or a list of messages; `tools`, `system` |
| alpaca | `instruction`, `output`; `input`, `system` |
| text | `text`: no conversation |
| preference | `chosen` and `rejected`: each a text or a list of messages; `prompt`, `tools`, `system` |
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

from ds_llm.data.rows import load_json

FORMATS = ("messages", "prompt_completion", "alpaca", "text", "preference")
FIELDS = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
# fields of rows that are parts of a conversation or say something of it; all others may be for the chat template
PARTS = {field for fields in FIELDS.values() for field in fields}
PARTS |= {"conversations", "input", "tools", "system", "label"}
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_call": "assistant",
}
REASONS = {
    "missing field": "the row lacks a field of the format, or has null in it",
    "wrong type": "a field or message is not of the type that the format has",
    "unknown role": f"a role other than {', '.join(ROLES)}",
    "empty": "no message, or one that says nothing",
    "not UTF-8": "half a surrogate pair in a text",
    "same answers": "chosen and rejected are the same",
}


class RowError(Exception):
    """A row that cannot be used. reason: one of a few names, for counts. detail: what is wrong and where."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self):
        return type(self), (self.reason, self.detail)


class Malformed(RowError):
    """A row that does not follow its format; `reason` is a key of REASONS."""


def detect(row: dict) -> str | None:
    """The format of a row, by its fields; None where it has the fields of no format."""
    for name, fields in FIELDS.items():
        if all(row.get(field) is not None for field in fields):
            return name
        if name == "messages" and row.get("conversations") is not None:
            return name
    return None


class Conversation(NamedTuple):
    """messages of `role`, `content` (text) and perhaps `tool_calls`; tools or None; the row's columns beside these."""

    messages: list[dict]
    tools: list[dict] | None
    columns: dict


def to_messages(row: dict, format: str) -> Conversation:
    """A row as a conversation.

    format: messages, prompt_completion or alpaca. Roles have one name each (human is user, gpt is assistant), content
    in parts is joined, arguments of tool calls given as JSON text are parsed, and null values are left out. Raises
    `Malformed`.
    """
    if format == "messages":
        field = "messages" if row.get("messages") is not None else "conversations"
        messages = _messages(_field(row, field, list), field)
    elif format == "prompt_completion":
        messages = _turns(row, "prompt", "user") + _turns(row, "completion", "assistant")
    elif format == "alpaca":
        instruction, more = _field(row, "instruction", str), row.get("input")
        if more is not None and not isinstance(more, str):
            raise Malformed("wrong type", f"input is {_kind(more)}, not a text")
        question = f"{instruction}\n\n{more}" if more and more.strip() else instruction
        answer = _field(row, "output", str)
        messages = _messages(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "alpaca"
        )
    else:
        raise ValueError(f"rows of format {format} are no single conversation")
    return Conversation(_with_system(row, messages), _tools(row), columns(row))


def columns(row: dict) -> dict:
    """The values of a row beside its messages, such as `enable_thinking`. A chat template may read them."""
    return {name: value for name, value in row.items() if value is not None and name not in PARTS}


def to_pair(row: dict) -> tuple[Conversation, Conversation]:
    """A preference row as (chosen, rejected): two whole conversations that share their beginning.

    `chosen` and `rejected` are whole conversations or, with `prompt`, only what follows it. Texts without a prompt are
    refused. Raises `Malformed`.
    """
    pair = []
    prompt = _turns(row, "prompt", "user") if row.get("prompt") is not None else []
    for field in ("chosen", "rejected"):
        if isinstance(row.get(field), str) and not prompt:
            raise Malformed("missing field", f"{field} is a text, so the row needs a prompt")
        turns = _turns(row, field, "assistant")
        if len(turns) < 2 or turns[: len(prompt)] != prompt:
            turns = prompt + turns
        pair.append(_with_system(row, turns))
    chosen, rejected = pair
    if chosen == rejected:
        raise Malformed("same answers")
    tools, rest = _tools(row), columns(row)
    return Conversation(chosen, tools, rest), Conversation(rejected, tools, rest)


def _field(row: dict, name: str, kind: type):
    value = row.get(name)
    if value is None:
        detail = f"{name} is null" if name in row else f"{name}; fields: {', '.join(map(str, row)) or 'none'}"
        raise Malformed("missing field", detail[:200])
    if not isinstance(value, kind):
        raise Malformed("wrong type", f"{name} is {_kind(value)}, not {'a list' if kind is list else 'a text'}")
    return value


def _turns(row: dict, name: str, role: str) -> list[dict]:
    """A field that holds a text, a message or a list of messages."""
    value = row.get(name)
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    elif isinstance(value, dict):
        value = [value]
    else:
        value = _field(row, name, list)
    return _messages(value, name)


def _messages(values: Iterable, where: str) -> list[dict]:
    messages = [_message(value, f"{where}, message {number}") for number, value in enumerate(values, 1)]
    if not messages:
        raise Malformed("empty", f"{where} holds no message")
    return messages


def _message(value, where: str) -> dict:
    if not isinstance(value, dict):
        raise Malformed("wrong type", f"{where} is {_kind(value)}, not an object")
    share_gpt = "from" in value and "role" not in value
    role, content = (value.get("from"), value.get("value")) if share_gpt else (value.get("role"), value.get("content"))
    if not isinstance(role, str):
        raise Malformed("missing field" if role is None else "wrong type", f"{where} has no role")
    if role not in ROLES:
        raise Malformed("unknown role", f"{where}: {role!r}"[:200])
    message = {"role": ROLES[role], "content": _content(content, where)}
    rest = {key: v for key, v in value.items() if v is not None and key not in ("role", "content", "from", "value")}
    if rest.get("weight", 1) not in (0, 1):
        raise Malformed("wrong type", f"{where}: weight is {str(rest['weight'])[:50]}, not 0 or 1")
    if role == "function_call":
        message = {"role": "assistant", "content": "", "tool_calls": _parse(message["content"], where)}
    if calls := rest.pop("tool_calls", None):
        message["tool_calls"] = calls
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], where)
    if not message["content"].strip() and not message.get("tool_calls") and message["role"] not in ("system", "tool"):
        raise Malformed("empty", f"{where} ({message['role']}) says nothing")
    for text in (message["content"], json.dumps(message.get("tool_calls"), ensure_ascii=False, default=str)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Malformed("not UTF-8", f"{where}, character {error.start + 1}") from None
    return {**rest, **message}


def _content(value, where: str) -> str:
    """Content as one text: null becomes empty, text parts are joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)):
        raise Malformed("wrong type", f"{where}: content is {_kind(value)}, not a text")
    parts = []
    for part in value:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            kind = part.get("type", "unknown") if isinstance(part, dict) else _kind(part)
            raise Malformed("wrong type", f"{where}: a part of the content is {kind}, not text")
        parts.append(text)
    return "".join(parts)


def _calls(calls, where: str) -> list[dict]:
    """Tool calls with their arguments as objects, which is what chat templates expect."""
    calls = calls if isinstance(calls, (list, tuple)) else [calls]
    result = []
    for call in calls:
        if not isinstance(call, dict):
            raise Malformed("wrong type", f"{where}: a tool call is {_kind(call)}, not an object")
        call = {key: value for key, value in call.items() if value is not None}
        if "function" not in call:
            call = {"type": "function", "function": call}
        function = call["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Malformed("wrong type", f"{where}: a tool call names no function")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parse(arguments, where) if arguments.strip() else {}
        if not isinstance(arguments, dict):
            raise Malformed("wrong type", f"{where}: arguments of a tool call are {_kind(arguments)}, not an object")
        result.append({**call, "function": {**function, "arguments": arguments}})
    return result


def _tools(row: dict) -> list[dict] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parse(tools, "tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        raise Malformed("wrong type", "tools is no list of objects")
    return list(tools)


def _with_system(row: dict, messages: list[dict]) -> list[dict]:
    system = row.get("system")
    if system is None or system == "" or messages[0]["role"] == "system":
        return messages
    if not isinstance(system, str):
        raise Malformed("wrong type", f"system is {_kind(system)}, not a text")
    return [{"role": "system", "content": system}, *messages]


def _parse(text: str, where: str):
    try:
        return load_json(text)
    except ValueError as error:
        raise Malformed("wrong type", f"{where}: not JSON ({error})"[:200]) from None


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
