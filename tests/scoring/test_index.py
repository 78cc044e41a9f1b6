"""The index on disk: all formats of files, order, interruption; the plan cut from it and shared out."""

import gzip
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_llm.data.sources import resolve
from ds_llm.pretrained.loading import load_tokenizer
from ds_llm.scoring import batches as plan
from ds_llm.scoring import index as index_module
from ds_llm.scoring.index import FILES, build

RANDOM = random.Random()


@pytest.fixture(scope="module")
def tokenizer(chats):
    return load_tokenizer(chats / "llama")


def words(most: int = 30) -> str:
    return " ".join(RANDOM.choice(["red", "blue", "cat", "sun"]) for _ in range(RANDOM.randint(1, most)))


def make(folder, data, tokenizer, key="k", taken=(), **more):
    sources = resolve(data)
    arguments = (tokenizer, ["entropy"], "answers", "auto", 100, "right", list(taken))
    return build(folder, key, sources, ["text"] * len(sources), arguments, **more)


def write(path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_every_row_of_every_kind_of_file_in_order(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(index_module, "SORT_ROWS", 7)
    texts = [words() for _ in range(50)]
    lines = [{"text": text} for text in texts[:20]]
    data = [write(tmp_path / "a.jsonl", [*lines[:10], "bad", *lines[10:]])]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts[20:40])
    pq.write_table(pa.table({"text": texts[40:49]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text(texts[49])
    data += [str(tmp_path / name) for name in ("b.jsonl.gz", "c.parquet", "d.txt")]
    index = make(tmp_path / "index", data, tokenizer)
    kept = [i for i in range(51) if i != 10]
    for text, sample in zip(texts, index.samples(np.array(kept)), strict=True):
        assert sample.input_ids.tolist() == tokenizer(text)["input_ids"][:100]
    costs = index.rows["cost"].astype(int)
    assert index.order.tolist() == sorted(kept, key=lambda i: (-costs[i], i))
    assert index.counts["rows"] == 51 and index.counts["errors"] == {"bad JSON": 1}
    assert [(e["idx"], e["line"]) for e in index.errors()] == [(10, 11)]
    assert index.counts["tokens"] == sum(len(s) for s in index.samples(np.array(kept)))


def test_an_interrupted_index_goes_on_to_the_same_bytes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(index_module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr("ds_llm.data.files.read.__defaults__", (200,))  # bytes of a batch
    data = [write(tmp_path / "a.jsonl", [{"text": words()} if RANDOM.random() < 0.9 else "bad" for _ in range(80)])]
    whole = make(tmp_path / "whole", data, tokenizer)
    encoded = []
    original = index_module.encoder

    def counted(*arguments):
        function = original(*arguments)
        return lambda item: encoded.append(item[1].first) or function(item)

    monkeypatch.setattr(index_module, "encoder", counted)
    calls = iter(range(1, 1000))

    def interrupt():
        if next(calls) % 4 == 0:
            raise KeyboardInterrupt

    stops = 0
    while True:
        try:
            index = make(tmp_path / "broken", data, tokenizer, check=interrupt)
            break
        except KeyboardInterrupt:
            stops += 1
            for name in FILES[:1]:  # a write that the record does not know of yet
                with open(tmp_path / "broken" / f"{name}.partial", "ab") as file:
                    file.write(b"torn")
    assert stops > 1 and len(encoded) == len(set(encoded)) + stops  # only the batch that was under way again
    for name in (*FILES, "order.npy"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert index.counts == whole.counts
    encoded.clear()
    make(tmp_path / "broken", data, tokenizer)
    assert not encoded
    make(tmp_path / "broken", data, tokenizer, key="another")
    assert encoded


def test_a_field_that_is_there_already_is_refused_with_its_line(tmp_path, tokenizer):
    data = [write(tmp_path / "a.jsonl", [{"text": "red"}, {"text": "red", "entropy": 1}])]
    with pytest.raises(Exception, match=r"a.jsonl line 2: has a field entropy already"):
        make(tmp_path / "index", data, tokenizer, taken=["entropy"])


def test_batches_hold_every_row_once_within_the_budget(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(plan, "SORT_ROWS", 13)
    data = [write(tmp_path / "a.jsonl", [{"text": words(60)} for _ in range(200)])]
    index = make(tmp_path / "index", data, tokenizer)
    for budget in (1, 60, 137, 100_000):
        batches = plan.make(index, budget)
        members = [batches.rows(index, b) for b in range(len(batches))]
        assert sorted(np.concatenate(members).tolist()) == list(range(200))
        for b, rows in enumerate(members):
            costs = index.rows["cost"][rows]
            assert len(rows) == 1 or costs.max() * len(rows) <= budget
            assert (batches.tokens[b], batches.padded[b]) == (costs.sum(), costs.max() * len(costs))
            if b + 1 < len(members):  # no batch is cut short
                assert costs.max() * (len(rows) + 1) > budget
        assert batches.padding == pytest.approx(1 - batches.tokens.sum() / batches.padded.sum())
        missing = np.array(sorted(RANDOM.sample(range(len(batches)), (len(batches) + 1) // 2)))
        for ranks in (1, 2, 3, 7):
            shares = plan.assign(batches, missing, ranks)
            assert sorted(np.concatenate(shares).tolist()) == missing.tolist()
            loads = [batches.padded[share].sum() for share in shares]
            assert max(loads) - min(loads) <= 1.05 * batches.padded[missing].max()  # the best that such a deal promises


def test_auto_leaves_batches_to_share_out_and_finds_what_fits(tmp_path, tokenizer, monkeypatch):
    from ds_llm.scoring.worker import largest

    index = make(tmp_path / "index", [write(tmp_path / "a.jsonl", [{"text": words()} for _ in range(100)])], tokenizer)
    assert plan.auto_limit(index) == plan.SMALLEST_AUTO
    monkeypatch.setattr(plan, "SMALLEST_AUTO", 1)
    limit = plan.auto_limit(index)
    assert limit * plan.FEWEST_BATCHES <= index.counts["tokens"] < 2 * limit * plan.FEWEST_BATCHES
    rows = plan.probe_rows(index, 10_000)
    longest = index.rows["cost"].max()
    assert len(rows) == 10_000 // longest and index.rows["cost"][rows[0]] == longest
    assert len(plan.probe_rows(index, 1)) == 1
    tried = []
    assert largest(lambda size: tried.append(size) or size <= 37, 1 << 10) == 32 and tried == [2, 4, 8, 16, 32, 64]
    assert largest(lambda size: False, 1 << 10) == 1
    assert largest(lambda size: True, 1 << 10) == 1 << 10
