import json
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from ds_llm.data import chat, conversations, supervised
from ds_llm.data.sources import build_once, digests, resolve
from ds_llm.data.supervised import prepare
from ds_llm.data.tokenizer import load_tokenizer
from ds_llm.data.tokens import IGNORE
from ds_llm.errors import UserError

from .conftest import random_text, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


def conversation(rng, turns=3, words=8):
    messages = []
    for _ in range(rng.randint(1, turns)):
        messages.append({"role": "user", "content": random_text(rng, rng.randint(1, words))})
        messages.append({"role": "assistant", "content": random_text(rng, rng.randint(1, words))})
    return messages


def expected(encoded) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array(encoded.input_ids, np.int64)
    labels = [token if trained else IGNORE for token, trained in zip(ids[1:], encoded.trained[1:], strict=True)]
    return ids, np.array([*labels, IGNORE], np.int64)


def rejects(data) -> list[dict]:
    return [json.loads(line) for line in Path(data.report["rejects"]).read_text().splitlines()]


BAD = [
    ('{"messages": [', "bad JSON"),
    ("", "empty"),
    ('{"text": "of the"}', "missing field"),
    ('{"messages": [{"role": "narrator", "content": "of"}]}', "unknown role"),
    ('{"messages": [{"role": "user", "content": "of"}]}', "no answer"),
    (
        '{"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a"}]}',
        "control token",
    ),
]


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_samples_are_the_rows_and_bad_rows_are_named(tmp_path, tokenizer, rng, train_on):
    rows = [conversation(rng) for _ in range(40)]
    lines = [(json.dumps({"messages": row}), row) for row in rows] + BAD
    rng.shuffle(lines)
    (tmp_path / "a.jsonl").write_text("".join(line + "\n" for line, _ in lines))
    data = prepare([tmp_path / "a.jsonl"], tokenizer, max_length=10_000, train_on=train_on, cache=tmp_path / "cache")
    good = [expected(chat.encode(tokenizer, row, train_on=train_on)) for _, row in lines if isinstance(row, list)]
    assert len(data) == len(good) == 40
    for i, (ids, labels) in enumerate(good):
        found = data.example(i)
        assert (found[0].dtype, found[1].dtype) == (np.int64, np.int64)
        assert found[0].tolist() == ids.tolist() and found[1].tolist() == labels.tolist()
    assert data.lengths.tolist() == [len(ids) for ids, _ in good]
    bad = [(number, reason) for number, (_, reason) in enumerate(lines, 1) if isinstance(reason, str)]
    listed = rejects(data)
    assert [(row["line"], row["reason"]) for row in listed] == bad
    assert {row["file"] for row in listed} == {str(tmp_path / "a.jsonl")}
    report = data.report
    assert (report["rows"], report["samples"], report["truncated"]) == (46, 40, 0)
    assert report["dropped"] == {reason: 1 for _, reason in BAD} and not set(report["dropped"]) - set(
        supervised.REASONS
    )
    assert report["tokens"] == sum(len(ids) for ids, _ in good)
    assert report["supervised_tokens"] == sum((labels >= 0).sum() for _, labels in good)
    assert report["sources"][0]["format"] == "messages"
    with pytest.raises(IndexError):
        data.example(40)


def test_long_samples_are_cut_or_dropped(tmp_path, tokenizer, rng):
    rows = [conversation(rng, words=20) for _ in range(60)]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": row} for row in rows])
    encoded = [expected(chat.encode(tokenizer, row)) for row in rows]
    limit = int(np.median([len(ids) for ids, _ in encoded]))
    cut = [
        (ids, labels) if len(ids) <= limit else (ids[:limit], [*labels[: limit - 1], IGNORE]) for ids, labels in encoded
    ]
    kept = [(ids, labels) for ids, labels in cut if max(labels) >= 0]
    right = prepare([tmp_path / "a.jsonl"], tokenizer, max_length=limit, cache=tmp_path / "cache")
    assert [right.example(i)[0].tolist() for i in range(len(right))] == [ids.tolist() for ids, _ in kept]
    assert [right.example(i)[1].tolist() for i in range(len(right))] == [list(map(int, labels)) for _, labels in kept]
    gone = 60 - len(kept)
    assert right.report["dropped"] == ({"cut off": gone} if gone else {})
    assert right.report["truncated"] == sum(len(ids) > limit for ids, _ in encoded) - gone
    drop = prepare([tmp_path / "a.jsonl"], tokenizer, max_length=limit, truncate="drop", cache=tmp_path / "cache")
    whole = [ids.tolist() for ids, _ in encoded if len(ids) <= limit]
    assert [drop.example(i)[0].tolist() for i in range(len(drop))] == whole
    assert drop.report["dropped"] == {"too long": 60 - len(whole)} and drop.report["truncated"] == 0
    assert drop.fingerprint != right.fingerprint


def test_every_format_in_one_mixture(tmp_path, tokenizer, rng):
    question, answer = random_text(rng, 5), random_text(rng, 5)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rows = {
        "messages": {"conversations": messages},
        "prompt_completion": {"prompt": question, "completion": answer},
        "alpaca": {"instruction": question, "input": "", "output": answer},
        "text": {"text": question},
    }
    for name, row in rows.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [{"unknown": 1}, row])
    paths = [tmp_path / f"{name}.jsonl" for name in rows]
    data = prepare(paths, tokenizer, max_length=999, cache=tmp_path / "cache")
    assert [source["format"] for source in data.report["sources"]] == list(rows)
    assert data.report["dropped"] == {"missing field": 4}
    encoded = [expected(chat.encode(tokenizer, messages))] * 3 + [expected(chat.encode_text(tokenizer, question))]
    for i, (ids, labels) in enumerate(encoded):
        assert [part.tolist() for part in data.example(i)] == [ids.tolist(), labels.tolist()]
    assert (data.example(3)[1][:-1] == data.example(3)[0][1:]).all()
    with pytest.raises(UserError, match="no token to train in 2 rows"):
        prepare(paths[:1], tokenizer, max_length=999, format="alpaca", cache=tmp_path / "cache")


def test_weights_repeat_and_choose(tmp_path, tokenizer, rng):
    sizes, weights = (30, 17, 8), (2.5, 0.3, 1)
    for k, size in enumerate(sizes):
        write_jsonl(tmp_path / f"{k}.jsonl", [{"prompt": f"{k} {i}", "completion": "of"} for i in range(size)])
    paths = [tmp_path / f"{k}.jsonl" for k in range(3)]

    def drawn(**options):
        data = prepare(paths, tokenizer, max_length=99, cache=tmp_path / "cache", **options)
        names = [tokenizer.decode(data.example(i)[0]).split("\n")[1].split("<")[0] for i in range(len(data))]
        return data, names

    data, names = drawn(weights=weights, seed=3)
    assert [source["drawn"] for source in data.report["sources"]] == [75, 5, 8]
    counts = {name: names.count(name) for name in set(names)}
    assert sorted(counts[f"0 {i}"] for i in range(30)) == [2] * 15 + [3] * 15
    assert sum(name.startswith("1") for name in counts) == 5 and all(counts[f"2 {i}"] == 1 for i in range(8))
    assert data.report["samples"] == len(data) == 88 and data.report["tokens"] == data.lengths.sum()
    again, same = drawn(weights=weights, seed=3)
    assert same == names and again.fingerprint == data.fingerprint
    other, others = drawn(weights=weights, seed=4)
    assert others != names and other.fingerprint != data.fingerprint
    assert drawn()[1] == [f"{k} {i}" for k in range(3) for i in range(sizes[k])]
    assert drawn(seed=5)[0].fingerprint == drawn(seed=6)[0].fingerprint
    for wrong in ([1, 2], [1, 1, -1], [1, 1, 0]):
        with pytest.raises(UserError, match="weights"):
            drawn(weights=wrong)


def test_what_the_fingerprint_covers(tmp_path, tokenizer_folder):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "of", "completion": "the"}])
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "of", "completion": "the"}])
    write_jsonl(tmp_path / "c.jsonl", [{"prompt": "of", "completion": "thee"}])
    plain, other = load_tokenizer(tokenizer_folder), load_tokenizer(tokenizer_folder)
    other.chat_template = other.chat_template.replace("message['content']", "message['content'] | trim")

    def fingerprint(file="a", tokenizer=plain, **options):
        options = {"max_length": 99, **options}
        return prepare([tmp_path / f"{file}.jsonl"], tokenizer, cache=tmp_path / "cache", **options).fingerprint

    first = fingerprint()
    assert first == fingerprint() == fingerprint("b") == fingerprint(format="prompt_completion")
    options = [{"max_length": 98}, {"train_on": "last"}, {"truncate": "drop"}, {"weights": [2]}]
    changed = [fingerprint("c"), fingerprint(tokenizer=other), *(fingerprint(**option) for option in options)]
    assert len({first, *changed}) == 7
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "of", "completion": "them"}])
    assert fingerprint() not in {first, *changed}


def test_several_that_prepare_the_same_build_once(tmp_path, tokenizer, rng, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [{"messages": conversation(rng)} for _ in range(30)])
    builds, build = [], supervised._build
    monkeypatch.setattr(supervised, "_build", lambda *arguments: (builds.append(1), build(*arguments)))
    found = []

    def work():
        found.append(prepare([tmp_path / "a.jsonl"], tokenizer, max_length=99, cache=tmp_path / "cache"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(builds) == 1 and len({data.fingerprint for data in found}) == 1


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path, "0" * 64, fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    folder = build_once(tmp_path, "0" * 64, lambda folder: (folder / "whole").write_text("x"))
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_worker_processes_give_the_same_bytes(tmp_path, tokenizer, rng, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [{"messages": conversation(rng)} for _ in range(200)] + [{"x": 1}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": random_text(rng, 9)} for _ in range(50)])
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    one = prepare(paths, tokenizer, max_length=60, cache=tmp_path / "one")
    monkeypatch.setattr(supervised, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(supervised, "available_cpus", lambda: 2)
    two = prepare(paths, tokenizer, max_length=60, cache=tmp_path / "two")
    assert one.fingerprint == two.fingerprint
    for name in ("ids.bin", "trained.bin", "boundaries.npy", "supervised.npy", "report.json", "rejects.jsonl"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


def test_a_pickle_holds_the_place_and_not_the_data(tmp_path, tokenizer, rng):
    write_jsonl(tmp_path / "a.jsonl", [{"text": random_text(rng, 50)} for _ in range(200)])
    data = prepare([tmp_path / "a.jsonl"], tokenizer, max_length=999, weights=[1.5], seed=2, cache=tmp_path / "cache")
    packed = pickle.dumps(data)
    assert len(packed) < 1000
    copy = pickle.loads(packed)
    assert copy.fingerprint == data.fingerprint and (copy.lengths == data.lengths).all()
    assert (copy.example(7)[1] == data.example(7)[1]).all()


def test_parquet_and_hub_rows(tmp_path, tokenizer, rng, monkeypatch):
    import datasets

    rows = [{"messages": conversation(rng)} for _ in range(1500)]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    local = prepare([tmp_path / "a.parquet"], tokenizer, max_length=25, cache=tmp_path / "cache")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **more: asked.append((*names, more["split"])) or table)
    hub = prepare(["owner/name/part:train_sft"], tokenizer, max_length=25, cache=tmp_path / "cache")
    prepare(["owner/name"], tokenizer, max_length=25, cache=tmp_path / "cache")
    assert asked == [("owner/name", "part", "train_sft"), ("owner/name", None, "train")]
    assert len(hub) == len(local)
    assert (hub.folder / "ids.bin").read_bytes() == (local.folder / "ids.bin").read_bytes()
    listed = rejects(local), rejects(hub)
    assert [row["line"] for row in listed[0]] == [row["line"] for row in listed[1]]
    assert {row["file"] for row in listed[1]} <= {"owner/name/part:train_sft"}


def test_data_sets_in_folders(tmp_path, rng):
    """Saved ones, whole or by splits, and a local copy of one of the hub, of which a plain folder is everything."""
    import datasets

    train, test = ([{"messages": conversation(rng)} for _ in range(count)] for count in (5, 3))
    parts = {name: datasets.Dataset.from_list(rows) for name, rows in (("train", train), ("test", test))}
    parts["train"].save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "parts")
    for name, part in parts.items():
        part.to_parquet(tmp_path / f"copy/data/{name}-00000-of-00001.parquet")
    for name, expected in (
        ("saved", train),
        ("parts", train),
        ("parts:test", test),
        ("copy:test", test),
        ("copy", test + train),
    ):
        (source,) = resolve([tmp_path / name])
        assert [row["messages"] for row in source.rows()] == [row["messages"] for row in expected], name
        assert digests([source], tmp_path / "cache") == digests(resolve([tmp_path / name]), tmp_path / "cache")
    for name, message in (("saved:x", "one split"), ("parts:val", "it has train, test"), ("copy:val", "datasets can")):
        with pytest.raises(UserError, match=message):
            resolve([tmp_path / name])


def test_hashes_are_of_contents_and_read_once(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in/a.jsonl", [{"text": "of"}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "of"}])
    first = digests(resolve([tmp_path / "in", tmp_path / "b.jsonl"]), tmp_path / "cache")
    assert first[0] == first[1]
    monkeypatch.setattr("hashlib.file_digest", None)  # reading again would fail
    assert digests(resolve([tmp_path / "b.jsonl", tmp_path / "in"]), tmp_path / "cache") == first


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"a": 1, "b": 2}], {}, r"format not recognised \(the fields of the first row are a, b\)"),
        ([], {}, "it holds no row"),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], {}, "rows of the format preference"),
        (
            [{"prompt": "q", "completion": "<|im_end|>"}],
            {},
            "no token to train in 1 rows .control token 1.; the first: .*line 1",
        ),
        ([{"text": "of"}], {"max_length": 1}, "max_length 1"),
        ([{"text": "of"}], {"format": "csv"}, "format csv: unknown"),
        ([{"text": "of"}], {"train_on": "first"}, "train_on first: unknown"),
        ([{"text": "of"}], {"truncate": "left"}, "truncate left: unknown"),
    ],
)
def test_mistakes_are_one_line(tmp_path, tokenizer, rows, options, message):
    write_jsonl(tmp_path / "a.jsonl", rows)
    for _ in range(2):  # what was built before does not hide it
        with pytest.raises(UserError, match=message) as error:
            prepare([tmp_path / "a.jsonl"], tokenizer, **{"max_length": 99, "cache": tmp_path / "cache", **options})
        assert "\n" not in str(error.value)


def test_missing_sources(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for names, message in (
        ([], "no data given"),
        ([tmp_path / "a.jsonl"], "no such file or folder"),
        (["data/a.jsonl"], "no such file"),
        (["owner/none"], "nor a data set that the hub gives"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(names, tokenizer, max_length=99, cache=tmp_path / "cache")


def test_a_tokenizer_without_a_chat_template(tmp_path, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = None
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "of"}])
    with pytest.raises(UserError, match="has no chat template"):
        prepare([tmp_path / "a.jsonl"], tokenizer, max_length=99, cache=tmp_path / "cache")
    assert len(prepare([tmp_path / "b.jsonl"], tokenizer, max_length=99, cache=tmp_path / "cache")) == 1


def test_reasons_have_one_meaning_each():
    assert not set(conversations.REASONS) & set(chat.REASONS)
