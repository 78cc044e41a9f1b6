import hashlib
import json
import os

import pytest

from ds_llm.data.clean import clean
from ds_llm.errors import UserError

from .conftest import write_jsonl
from .test_files import make
from .test_rows import BAD


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_row_is_kept_or_named_with_its_reason(tmp_path, rng, texts, workers):
    lines = [(json.dumps({"text": text, "id": i}).encode(), text) for i, text in enumerate(texts)]
    lines += [(line, reason) for line, reason in BAD]
    copies = rng.sample(lines[: len(texts)], 10)
    lines += [(line.replace(b'{"text": "', b'{"text": " \\r\\n'), text) for line, text in copies]
    rng.shuffle(lines)
    cut = len(lines) // 2
    expected, rejected, seen = [], [], set()
    for part, chosen in (("a.jsonl", lines[:cut]), ("b.jsonl", lines[cut:])):
        (tmp_path / part).write_bytes(b"".join(line + b"\n" for line, _ in chosen))
        for number, (line, content) in enumerate(chosen, 1):
            name = str(tmp_path / part)
            if (line, content) in BAD:
                rejected.append((name, number, content))
            elif len(content) < 20:
                rejected.append((name, number, "too short"))
            elif len(content) > 150:
                rejected.append((name, number, "too long"))
            elif content in seen:
                rejected.append((name, number, "duplicate"))
            else:
                seen.add(content)
                expected.append({"text": content, "id": json.loads(line)["id"]})
    out = tmp_path / "out.jsonl"
    options = {"min_chars": 20, "max_chars": 150, "workers": workers, "batch_bytes": rng.choice([200, 5000])}
    result = clean([tmp_path], out, **options)
    assert read_rows(out) == expected
    found = read_rows(tmp_path / "out.jsonl.rejects.jsonl")
    assert [(row["file"], row["line"], row["reason"]) for row in found] == rejected
    assert result["records"] == len(lines)
    assert sum(result["dropped"].values()) == len(rejected)
    lengths = sorted(len(row["text"]) for row in expected)
    assert result["lengths"]["total"] == sum(lengths)
    assert (result["lengths"]["min"], result["lengths"]["max"]) == (lengths[0], lengths[-1])
    histogram = result["lengths"]["histogram"]
    bins = list(zip(histogram["edges"][:-1], histogram["edges"][1:], strict=True))
    assert histogram["counts"] == [sum(low <= n < high for n in lengths) for low, high in bins]
    assert json.loads((tmp_path / "out.jsonl.stats.json").read_text()) == result
    assert (tmp_path / "out.jsonl.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial*"))


def test_all_formats_give_the_same_rows(tmp_path, texts):
    outputs = []
    for kind in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"):
        clean([make(tmp_path, kind, texts)], tmp_path / f"out{kind}.jsonl", workers=1, batch_bytes=500)
        outputs.append([row["text"] for row in read_rows(tmp_path / f"out{kind}.jsonl")])
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    clean([folder], tmp_path / "out.txt.jsonl", workers=1)
    outputs.append([row["text"] for row in read_rows(tmp_path / "out.txt.jsonl")])
    assert outputs == [list(dict.fromkeys(texts))] * 5


def test_text_is_tidied(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "  one\r\ntwo\rthree\x00 \n"}, {"text": "\x00 \r"}])
    clean([tmp_path / "a.jsonl"], tmp_path / "out.jsonl", workers=1)
    assert read_rows(tmp_path / "out.jsonl") == [{"text": "one\ntwo\nthree"}]
    assert [row["reason"] for row in read_rows(tmp_path / "out.jsonl.rejects.jsonl")] == ["empty"]


def test_another_field(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"content": "x", "text": 5}, {"content": "y"}])
    clean([tmp_path / "a.jsonl"], tmp_path / "out.jsonl", field="content", workers=1)
    assert read_rows(tmp_path / "out.jsonl") == [{"content": "x", "text": 5}, {"content": "y"}]
    assert not (tmp_path / "out.jsonl.rejects.jsonl").exists()


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"content": "x"}, {"content": "y"}])
    with pytest.raises(UserError, match=r"missing field 2.*a\.jsonl line 1: missing field, fields: content"):
        clean([tmp_path / "a.jsonl"], tmp_path / "out.jsonl", workers=1)
    clean([tmp_path / "a.jsonl"], tmp_path / "out.jsonl", field="content", workers=1)  # nothing stands in the way
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(UserError, match="the input holds no rows"):
        clean([tmp_path / "b.jsonl"], tmp_path / "c.jsonl", workers=1)
    with pytest.raises(UserError, match="no row could pass"):
        clean([tmp_path / "b.jsonl"], tmp_path / "c.jsonl", min_chars=5, max_chars=4)


def test_a_finished_output_is_kept_unless_told_otherwise(tmp_path, capsys):
    source, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    write_jsonl(source, [{"text": "short"}, {"text": "a longer one"}])
    first = clean([source], out, workers=1)
    before = out.stat().st_mtime_ns
    assert clean([source], out, workers=2) == first
    assert out.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"made from another min_chars; use --overwrite"):
        clean([source], out, min_chars=8, workers=1)
    assert len(read_rows(out)) == 2
    clean([source], out, min_chars=8, workers=1, overwrite=True)
    assert read_rows(out) == [{"text": "a longer one"}]
    assert (tmp_path / "out.jsonl.rejects.jsonl").exists()

    write_jsonl(source, [{"text": "changed input"}])
    os.utime(source, ns=(1, 1))
    with pytest.raises(UserError, match="another inputs"):
        clean([source], out, min_chars=8, workers=1)
    clean([source], out, min_chars=8, workers=1, overwrite=True)
    assert not (tmp_path / "out.jsonl.rejects.jsonl").exists()  # a file of the run before

    (tmp_path / "mine.jsonl").write_text("precious")
    with pytest.raises(UserError, match="of unknown origin"):
        clean([source], tmp_path / "mine.jsonl", workers=1)
    assert (tmp_path / "mine.jsonl").read_text() == "precious"


def test_duplicates_are_found_across_files_and_batches(tmp_path, rng, texts):
    chosen = rng.choices(texts, k=300)
    for i in range(3):
        write_jsonl(tmp_path / f"{i}.jsonl", [{"text": text} for text in chosen[i::3]])
    clean([tmp_path], tmp_path / "out.jsonl", workers=1, batch_bytes=300)
    found = [hashlib.sha256(row["text"].encode()).hexdigest() for row in read_rows(tmp_path / "out.jsonl")]
    assert len(found) == len(set(found)) == len(set(chosen))
