import datetime
import decimal
import json

import pytest

from ds_llm.data.files import Position, find, read
from ds_llm.data.rows import REASONS, Document, documents, to_json


def parse(path, field="text", size=1 << 20):
    files = find([path])
    return [item for batch in read(files, Position(), size) for item in documents(batch, field)]


BAD = [  # (line, reason) with something wrong in each way
    (b'{"text": "cut', "bad JSON"),
    (b"no json", "bad JSON"),
    (b'{"text": NaN}', "bad JSON"),
    (b"[" * 100_000, "bad JSON"),
    (b'{"text": ' + b"9" * 5000 + b"}", "bad JSON"),
    (b'{"other": "x"}', "missing field"),
    (b'{"text": null}', "missing field"),
    (b'{"text": 5}', "wrong type"),
    (b'{"text": ["a"]}', "wrong type"),
    (b'["a"]', "wrong type"),
    (b'"a"', "wrong type"),
    (b"null", "wrong type"),
    (b'{"text": ""}', "empty"),
    (b'{"text": " \\n\\t "}', "empty"),
    (b"", "empty"),
    (b"  \t", "empty"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\xc3"}', "not UTF-8"),
    (b'{"text": "a\\ud800b"}', "not UTF-8"),
]


@pytest.mark.parametrize("size", [1, 60, 1 << 20])
def test_every_bad_line_has_its_reason_and_number(tmp_path, rng, size):
    lines = [(b'{"text": "good %d"}' % i, None) for i in range(30)] + BAD
    rng.shuffle(lines)
    lines.append((b'{"text": "last"}', None))
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(line for line, _ in lines) + rng.choice([b"", b"\n"]))
    items = parse(tmp_path / "a.jsonl", size=size)
    found = [(item.number, None if isinstance(item, Document) else item.reason) for item in items]
    assert found == [(i, reason) for i, (_, reason) in enumerate(lines, 1)]
    assert {reason for _, reason in found} - {None} <= set(REASONS)


def test_line_ends_and_byte_order_marks_of_other_systems(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree\r\nfour")
    assert [item.text for item in parse(tmp_path / "a.jsonl")] == ["one", "two"]
    assert [item.text for item in parse(tmp_path / "b.txt")] == ["three\r\nfour"]


def test_the_line_of_a_broken_text_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    (item,) = parse(tmp_path / "a.txt")
    assert (item.number, item.reason) == (3, "not UTF-8")


def test_parquet_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = pa.array([b"good", b"bad \xff", b"", None, b"last"], pa.binary())
    column = pa.StringArray.from_buffers(5, *raw.buffers()[1:], raw.buffers()[0])  # Arrow takes the bytes unchecked
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=2)
    items = parse(tmp_path / "a.parquet", size=1)
    assert [(i.number, getattr(i, "reason", None)) for i in items] == [
        (1, None),
        (2, "not UTF-8"),
        (3, "empty"),
        (4, "missing field"),
        (5, None),
    ]


def test_rows_that_json_cannot_hold_are_written_as_json():
    row = {"a": float("nan"), "b": [float("inf"), 1.5], "c": b"\xff", "d": datetime.date(2020, 1, 2)}
    row |= {"e": decimal.Decimal("1.10"), "f": "naïve", "g": "\ud800"}
    expected = {"a": None, "b": [None, 1.5], "c": "/w==", "d": "2020-01-02", "e": "1.10", "f": "naïve", "g": "\ud800"}
    assert json.loads(to_json(row)) == expected
    assert to_json({"f": "naïve"}) == '{"f": "naïve"}'.encode()
