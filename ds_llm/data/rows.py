"""Raw records as documents: each becomes a `Document` or a `Reject` with its number and reason."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ds_llm.data.files import TEXT_LIMIT, Batch

MOST_LEVELS = 200  # of brackets in each other: far from where Python's own limit is, which depends on who calls
TOO_LARGE = f"more than {TEXT_LIMIT >> 20} MB; split it"
REASONS = {
    "not UTF-8": "bytes or escapes that are no Unicode text",
    "bad JSON": f"the line is not a JSON value, or one of more than {MOST_LEVELS} levels",
    "wrong type": "the row is not an object, or the field not a string",
    "missing field": "the row has no such field, or null in it",
    "empty": "blank line, or nothing but white space in the field",
    "too large": f"a line, or the text of a Parquet row, of more than {TEXT_LIMIT >> 20} MB",
    "too short": "fewer characters than --min-chars",
    "too long": "more characters than --max-chars",
    "duplicate": "the same text as an earlier row (sha256)",
}
BOM = b"\xef\xbb\xbf"


@dataclass(slots=True)
class Document:
    """A record with text: `number` is its line or row in the file, from 1; `row` the whole record."""

    number: int
    text: str
    row: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Reject:
    """A record that cannot be used; `reason` is a key of REASONS, `text` what an empty document consists of."""

    number: int
    reason: str
    detail: str = ""
    text: str | None = None


def documents(batch: Batch, name: str) -> Iterator[Document | Reject]:
    """Every record of a batch in order; `name` is the field that holds the text."""
    for item in records(batch, name):
        yield item if isinstance(item, Reject) else _document(*item, name)


def records(batch: Batch, name: str = "text") -> Iterator[tuple[int, dict] | Reject]:
    """Every record of a batch in order as (number, row); a plain text is a row whose field `name` holds it."""
    if batch.kind == "parquet":
        yield from _rows(batch)
    elif batch.kind == "text":
        yield _text(batch, name)
    elif batch.kind == "too large":
        yield Reject(batch.first, "too large", TOO_LARGE)
    else:
        data = batch.data.removeprefix(BOM) if batch.first == 1 else batch.data
        lines = data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        for number, line in enumerate(lines, batch.first):
            yield _line(number, line)


def _line(number: int, line: bytes) -> tuple[int, dict] | Reject:
    if not line.strip():
        return Reject(number, "empty", "blank line")
    try:
        row = load_json(line.decode())
    except UnicodeDecodeError as error:
        return Reject(number, "not UTF-8", f"byte {error.start + 1} of the line")
    except ValueError as error:
        return Reject(number, "bad JSON", str(error))
    if not isinstance(row, dict):
        return Reject(number, "wrong type", f"the row is {_kind(row)}, not an object")
    return number, row


def load_json(text: str):
    """The value of a JSON text. Raises `ValueError` for invalid JSON, NaN, infinities and too many levels."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"nested deeper than {MOST_LEVELS} levels") from None
    if text.count("[") + text.count("{") > MOST_LEVELS:  # else it cannot be deeper
        level = [value]
        for _ in range(MOST_LEVELS):
            level = [inner for outer in level if isinstance(outer, (dict, list)) for inner in _inside(outer)]
        if any(isinstance(inner, (dict, list)) for inner in level):
            raise ValueError(f"nested deeper than {MOST_LEVELS} levels")
    return value


def _inside(value: dict | list):
    return value.values() if isinstance(value, dict) else value


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _text(batch: Batch, name: str) -> tuple[int, dict] | Reject:
    data = batch.data.removeprefix(BOM)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return Reject(data.count(b"\n", 0, error.start) + 1, "not UTF-8", f"byte {error.start + 1} of the file")
    return 1, {name: text}


def _rows(batch: Batch) -> Iterator[tuple[int, dict] | Reject]:
    import pyarrow as pa

    table = pa.ipc.open_stream(batch.data).read_all()
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError:  # some value of the batch is no text: find out which rows are sound
        rows = [_row_or_none(table, i) for i in range(table.num_rows)]
    for number, row in enumerate(rows, batch.first):
        yield (number, row) if row is not None else Reject(number, "not UTF-8", "a column holds bytes that are no text")


def _row_or_none(table, i: int) -> dict | None:
    try:
        return table.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return None


def _document(number: int, row: dict, name: str) -> Document | Reject:
    text = row.get(name)
    if text is None:
        detail = "null" if name in row else f"fields: {', '.join(map(str, row)) or 'none'}"
        return Reject(number, "missing field", detail[:200])
    if not isinstance(text, str):
        return Reject(number, "wrong type", f"{name} is {_kind(text)}, not a string")
    if len(text) > TEXT_LIMIT:
        return Reject(number, "too large", TOO_LARGE)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a JSON escape of half a surrogate pair
        return Reject(number, "not UTF-8", f"character {error.start + 1} of {name} is half of a surrogate pair")
    if not text.strip():
        return Reject(number, "empty", f"no characters in {name}" if not text else f"only white space in {name}", text)
    return Document(number, text, row)


def _kind(value) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def to_json(row: dict) -> bytes:
    """A row as one line of UTF-8 JSON without the newline.

    Values of Parquet that JSON lacks: dates and decimals become strings, bytes base64, NaN and infinities null.
    """
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        text = json.dumps(_finite(row), ensure_ascii=False, default=_plain)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair in another field: keep it as the escape that it was
        return json.dumps(_finite(row), default=_plain).encode()


def _plain(value) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))) else value
