"""Rows that no program should write, through preparation, fine-tuning and scoring: each is counted and named, the
others are used, and nothing ends with a traceback or without memory."""

import gzip
import json
import multiprocessing
import random
import resource
from pathlib import Path

import numpy as np
import pytest

from ds_llm.data import supervised
from ds_llm.data.clean import clean
from ds_llm.data.encode import encode
from ds_llm.errors import UserError
from ds_llm.generation import prompts
from ds_llm.pretrained.loading import load_tokenizer
from ds_llm.scoring import options, run

DEEP = 100_000
FORK = multiprocessing.get_context("fork")


REASONS = {"bad JSON", "not UTF-8", "wrong type", "missing field", "empty"}


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def nested(depth: int) -> str:
    kind = random.choice([("[", "]"), ('{"a":', "}")])
    return kind[0] * depth + "1e999" + kind[1] * depth


# line -> reason of its rejection, or the text that is kept
LINES = [
    (b'{"text": "cut', "bad JSON"),
    (b'{"text": "two"} {"text": "rows"}', "bad JSON"),
    (b'{"text": "a",}', "bad JSON"),
    (b"{'text': 'quotes'}", "bad JSON"),
    (b'{"text": NaN}', "bad JSON"),
    (b'{"text": "a raw NUL: \x00"}', "bad JSON"),
    (b"\x00" * 512, "bad JSON"),
    (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "bad JSON"),
    (f'{{"text": "deep", "x": {nested(DEEP)}}}'.encode(), "bad JSON"),
    (f'{{"text": "deep", "x": {nested(random.randint(200, 990))}}}'.encode(), "bad JSON"),
    (b"[" * DEEP, "bad JSON"),
    (b'{"text": "\xff\xfe"}', "not UTF-8"),
    ('{"text": "utf-16"}'.encode("utf-16-le"), "bad JSON"),
    (b'{"text": "half a pair: \\ud83d"}', "not UTF-8"),
    (b'{"text": 12}', "wrong type"),
    (b'{"text": ["a list"]}', "wrong type"),
    (b'"no object"', "wrong type"),
    (b"17", "wrong type"),
    (b'{"text": null}', "missing field"),
    (b'{"Text": "other name"}', "missing field"),
    (b'{"text": " \\n\\t "}', "empty"),
    (b"   ", "empty"),
    (b'\xef\xbb\xbf{"text": "behind a byte order mark in the middle"}', "bad JSON"),
    (b'{"text": "first", "text": "the last of two"}', "the last of two"),
    (b'{"text": "an escaped \\u0000 NUL", "n": 1e400}', "an escaped  NUL"),
    (b'{"text": "12", "n": "12"}', "12"),
    (b'{"text": "carriage return"}\r', "carriage return"),
    (f'{{"text": "levels", "x": {nested(random.randint(1, 190))}}}'.encode(), "levels"),
    ('{"text": "\u2028 is no end of a line"}'.encode(), "\u2028 is no end of a line".strip()),
]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_bad_line_is_named_and_the_others_are_kept(tmp_path, workers):
    lines = random.sample(LINES, len(LINES))
    data = b"\n".join(line for line, _ in lines)
    (tmp_path / "in.jsonl").write_bytes(data if lines[0][0].startswith(b"\xef") else b"\xef\xbb\xbf" + data)
    clean([tmp_path / "in.jsonl"], tmp_path / "out.jsonl", workers=workers, batch_bytes=random.randint(50, 500_000))
    texts = [row["text"] for row in rows(tmp_path / "out.jsonl")]
    rejects = rows(tmp_path / "out.jsonl.rejects.jsonl")
    first_is_text = lines[0][0].startswith(b"\xef")  # its mark is the file's, and is skipped
    expected = [text for number, (_, text) in enumerate(lines) if text not in REASONS]
    named = [(number, reason) for number, (_, reason) in enumerate(lines, 1) if reason in REASONS]
    if first_is_text:
        expected, named = ["behind a byte order mark in the middle", *expected], named[1:]
    assert texts == expected
    assert [(row["line"], row["reason"]) for row in rejects] == named


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_row_of_100_mb_takes_no_memory_and_no_other_row(tmp_path, suffix):
    source = tmp_path / f"in{suffix}"
    with gzip.open(source, "wb", 1) if suffix.endswith("gz") else open(source, "wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(100):
            file.write(b"huge row " * (10**6 // 9))
        file.write(b'"}\n{"text": "after"}\n')

    def child(answer) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        clean([source], tmp_path / "out.jsonl", workers=1)
        answer.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    here, there = FORK.Pipe()
    process = FORK.Process(target=child, args=(there,))
    process.start()
    grown = here.recv()
    process.join()
    assert grown < 2.5 * 64 * 1024, f"{grown / 1024:.0f} MiB"  # the longest line that is read, joined once
    assert [row["text"] for row in rows(tmp_path / "out.jsonl")] == ["before", "after"]
    (reject,) = rows(tmp_path / "out.jsonl.rejects.jsonl")
    assert (reject["line"], reject["reason"]) == (2, "too large")


def test_deep_and_strange_conversations_are_bad_rows(chats, tmp_path):
    good = {"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]}
    user, deep = good["messages"][0], "[" * DEEP + "]" * DEEP
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": deep}]}
    bad = [
        {"messages": [user, call]},
        {"messages": [user, {"role": "function_call", "content": deep}]},
        {**good, "tools": deep},
        {"messages": [user, {"role": "assistant", "content": 5}]},
        {"messages": [user, {"role": ["assistant"], "content": "x"}]},
        {"messages": [user, {"role": "assistant", "content": "x", "weight": "1"}]},
        {"messages": {"role": "user"}},
        {"messages": []},
    ]
    mixed = [good] * 9 + bad
    random.shuffle(mixed)
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    found = supervised.prepare([source], load_tokenizer(chats / "llama"), max_length=64, cache=tmp_path / "cache")
    assert len(found) == 9 and sum(found.report["dropped"].values()) == len(bad)
    named = {row["line"] for row in rows(Path(found.report["rejects"]))}
    assert named == {number for number, row in enumerate(mixed, 1) if row in bad}


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for i in range(10 ** 12) %}x{% endfor %}", "{% if %}"],
)
def test_hostile_chat_templates_are_one_error(chats, tmp_path, template):
    tokenizer = load_tokenizer(chats / "llama")
    tokenizer.chat_template = template + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError) as raised:
        supervised.prepare([chats / "train.jsonl"], tokenizer, max_length=64, cache=tmp_path)
    assert "\n" not in str(raised.value)


def test_scoring_gives_bad_rows_an_error_and_all_others_a_score(chats, tmp_path):
    text = b'{"text": "red cat"}'
    lines = [line for line, _ in LINES if not line.startswith(b"\xef")]
    lines += [text] * 30  # what most rows are decides about the format
    random.shuffle(lines)
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    flags = {"model": str(chats / "llama"), "data": [str(tmp_path / "in.jsonl")], "out": str(tmp_path / "out.jsonl")}
    run.score(options.load(flags={**flags, "format": "text", "report": False}))
    kept = {line for line, found in LINES if found not in REASONS}
    found = rows(tmp_path / "out.jsonl")
    assert len(found) == len(lines)
    for line, row in zip(lines, found, strict=True):
        if line in kept or line == text:
            assert np.isfinite(row["entropy"]) and "error" not in row
        else:
            assert row["entropy"] is None and row["error"]


def test_rows_that_encode_to_nothing_usable_are_one_error(chats, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(line for line, found in LINES if found == "bad JSON"))
    with pytest.raises(UserError, match=r"nothing to write: .*bad JSON"):
        encode([tmp_path / "in.jsonl"], tmp_path / "out.bin", chats / "tokenizer", workers=1)
    assert not (tmp_path / "out.bin").exists()


def test_bad_prompts_get_an_error_of_their_own(tmp_path):
    lines = [b'{"prompt": "fine"}', b'{"prompt": ' + b"[" * DEEP, b'{"prompt": NaN}', b"\xff", b"[]", b'{"prompt": 5}']
    random.shuffle(lines)
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    for line, row in zip(lines, prompts.read_rows(str(tmp_path / "in.jsonl")), strict=True):
        assert (row.error is None) == (line == b'{"prompt": "fine"}'), line[:30]
