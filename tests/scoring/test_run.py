"""Whole runs in one process: the output, interruption at any record, memory that runs out, refusals."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from chats import WORDS, conversations
from devices import FP16_HERE

from ds_llm.errors import ConfigError, UserError
from ds_llm.pretrained.loading import load_tokenizer
from ds_llm.scoring import options, parts, run
from ds_llm.scoring.forward import Scorer
from ds_llm.scoring.metrics import Sample
from ds_llm.scoring.run import compute_entropy_for_model

RANDOM = random.Random()
ODD = '  {"n": 1E2,"text":"red"  , "big": 123456789012345678901234567890.10 }'  # a row stays as it was written


@pytest.fixture(scope="module")
def model(chats):
    return str(chats / "llama")


@pytest.fixture
def data(tmp_path):
    """Chats, texts and prompts in three files; bad rows among them. Returns their names."""
    texts = [{"text": " ".join(RANDOM.choices(WORDS, k=RANDOM.randint(1, 12))), "id": i} for i in range(30)]
    chats = list(conversations(20, RANDOM.randrange(1 << 30)))
    pairs = [{"prompt": "reverse red blue", "completion": "blue red"}, {"prompt": "x"}]
    lines = {
        "a.jsonl": [*texts[:9], "{bad", ODD, *texts[9:]],
        "b.jsonl": [*chats[:4], {"messages": []}, *chats[4:], {}],
    }
    lines["c.jsonl"] = pairs
    for name, found in lines.items():
        dumped = (row if isinstance(row, str) else json.dumps(row) for row in found)
        (tmp_path / name).write_text("".join(f"{line}\n" for line in dumped))
    return [str(tmp_path / name) for name in lines]


def configure(model, data, out, **more):
    flags = {"model": model, "data": data, "out": str(out), "tokens_per_batch": 160, "report": False, **more}
    return options.load(flags=flags)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def everything(out):
    return {p.name: p.read_bytes() for p in (out, *out.with_name(out.name + ".d").glob("*.parquet"))}


def test_every_row_has_one_line_with_the_scores_it_has_alone(tmp_path, model, data):
    out = tmp_path / "scores.jsonl"
    config = configure(model, data, out, metric=["entropy", "logprob", "ifd"], field=["e0", "l0", "ifd"], report=True)
    statistics = run.score(config)
    given = [line for name in data for line in Path(name).read_text().splitlines()]
    found = lines(out)
    assert len(found) == len(given) == statistics["rows"]
    scorer, tokenizer = Scorer(model, config.metric, dtype="fp32"), load_tokenizer(model)
    bad = 0
    for line, row in zip(given, found, strict=True):
        try:
            before = json.loads(line)
        except ValueError:
            assert row["error"].startswith("bad JSON") and (row["line"], row["e0"]) == (10, None)
            bad += 1
            continue
        assert {name: row[name] for name in before} == before
        if "error" in row:
            assert row["e0"] is row["l0"] is row["ifd"] is None
            bad += 1
        elif "text" in before:
            ids = np.array(tokenizer(before["text"])["input_ids"])
            check(row, scorer.score([Sample(ids, np.arange(len(ids)) > 0)])[0])
        else:
            messages = before.get("messages") or [
                {"role": "user", "content": before["prompt"]},
                {"role": "assistant", "content": before["completion"]},
            ]
            marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            sample = Sample(np.array(marked["input_ids"]), np.array(marked["assistant_masks"], bool))
            check(row, scorer.score([sample])[0])
    assert bad == 4 and sum(statistics["errors"].values()) == 4 and statistics["scored"] == len(found) - 4
    assert out.read_text().split("\n")[10].startswith(ODD[:-2] + ', "e0": ')
    table = pq.read_table(tmp_path / "scores.jsonl.d" / "rows.parquet").to_pylist()
    assert [row["idx"] for row in table] == list(range(len(found)))
    assert [row["e0"] for row in table] == [row["e0"] for row in found]
    values = [row["e0"] for row in found if row["e0"] is not None]
    assert statistics["columns"]["e0"]["mean"] == pytest.approx(np.mean(values))
    assert "e0" in (tmp_path / "scores.jsonl.d" / "report.html").read_text()
    manifest = json.loads((tmp_path / "scores.jsonl.d" / "manifest.json").read_text())
    assert manifest["attempts"][0]["versions"]["torch"] and manifest["options"]["metric"] == config.metric


def check(row, alone):
    for field, column in (("e0", "entropy"), ("l0", "logprob"), ("ifd", "ifd")):
        assert row[field] == (None if alone[column] is None else pytest.approx(alone[column], rel=1e-4, abs=1e-5))


def test_interrupted_at_any_record_it_goes_on_to_the_same_bytes(tmp_path, model, data, monkeypatch):
    whole = tmp_path / "whole.jsonl"
    run.score(configure(model, data, whole, metric=["entropy", "ifd"], per_token=True))
    append, left, appended = parts.Part.append, [0], []

    def torn(self, batch, payload):
        left[0] -= 1
        if left[0] < 0:  # killed while it writes
            parts.os.write(self._file, parts._record(batch, payload)[: RANDOM.randrange(12 + len(payload))])
            raise KeyboardInterrupt
        append(self, batch, payload)
        appended.append(batch)

    monkeypatch.setattr(parts.Part, "append", torn)
    out = tmp_path / "broken.jsonl"
    stops = 0
    while not out.exists():
        left[0] = RANDOM.randrange(1, 5)
        try:
            run.score(configure(model, data, out, metric=["entropy", "ifd"], per_token=True))
        except KeyboardInterrupt:
            stops += 1
    assert stops > 2 and len(appended) == len(set(appended))  # no batch twice
    assert [b.replace(b"whole", b"broken") for b in everything(whole).values()] == list(everything(out).values())
    assert {p.name for p in (tmp_path / "broken.jsonl.d").iterdir()} >= {"manifest.json", "tokens.parquet"}
    assert not (tmp_path / "broken.jsonl.d" / "parts").exists()


def test_per_token_values_are_those_that_the_scores_are_means_of(tmp_path, model, data):
    out = tmp_path / "scores.jsonl"
    run.score(configure(model, data, out, metric=["entropy"], per_token=True, only_idx=True, max_length=20))
    tokens = pq.read_table(tmp_path / "scores.jsonl.d" / "tokens.parquet").to_pylist()
    found = lines(out)
    assert [row["idx"] for row in found] == list(range(len(found)))
    assert all(set(row) <= {"idx", "entropy", "error"} for row in found)
    assert [row["idx"] for row in tokens] == [row["idx"] for row in found if "error" not in row]
    for row in tokens:
        assert len(row["positions"]) == len(row["entropy_per_token"]) and max(row["positions"], default=0) < 20
        mean = np.mean(row["entropy_per_token"]) if row["positions"] else 0
        assert found[row["idx"]]["entropy"] == pytest.approx(mean, rel=1e-5)


def test_where_memory_runs_out_batches_are_halved_and_nothing_is_lost(tmp_path, model, data, monkeypatch):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run.score(configure(model, data, whole, tokens_per_batch=800))
    sizes, plain = [], Scorer.score

    def small(self, samples):
        sizes.append(max(map(len, samples)) * len(samples))
        if sizes[-1] > 250:
            raise torch.OutOfMemoryError("no more")
        return plain(self, samples)

    monkeypatch.setattr(Scorer, "score", small)
    run.score(configure(model, data, out, tokens_per_batch=800))
    assert sum(size > 250 for size in sizes) <= 4  # it learns what does not fit
    for a, b in zip(lines(whole), lines(out), strict=True):
        assert (a["entropy"] is None and b["entropy"] is None) or a["entropy"] == pytest.approx(b["entropy"], rel=1e-4)
    monkeypatch.setattr(Scorer, "score", lambda self, samples: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(UserError, match=r"too little memory for the row with idx \d+ \(\d+ tokens\) by itself"):
        run.score(configure(model, data, tmp_path / "none.jsonl"))


def test_a_finished_run_is_left_alone_and_another_one_is_refused(tmp_path, model, data, chats, monkeypatch):
    out = tmp_path / "scores.jsonl"
    first = compute_entropy_for_model(model, data, out, "entropy_0", tokens_per_batch=160, report=False)
    assert all("entropy_0" in row for row in lines(out))
    before = out.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(run, "Scorer", None)  # nothing is loaded for it
        assert compute_entropy_for_model(model, data, out, "entropy_0") == first
    again = {"field": ["entropy_0"], "metric": ["entropy"]}
    same = configure(model, data, out, **again)
    assert run.score(same) == first and out.stat().st_mtime_ns == before
    for change, said in (
        ({"max_length": 64}, r"another max_length \(128 there, 64 now\)"),
        ({"tokens": "all"}, "another tokens"),
        ({"metric": ["logprob"]}, "another metric"),
        ({"data": data[:1]}, "another data"),
        ({"field": ["x"]}, "finished with another field"),
        ({"tokens_per_batch": 99}, "with tokens_per_batch=160"),
        ({"model": other_weights(chats, tmp_path)}, "another model"),
    ):
        with pytest.raises(UserError, match=said) as error:
            run.score(options.load(flags={**vars(same), **change}))
        assert "--overwrite" in str(error.value) and "\n" not in str(error.value)
    assert out.stat().st_mtime_ns == before
    with open(out, "a") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match="changed or removed since"):
        run.score(same)
    other = options.load(flags={**vars(same), "tokens": "all", "overwrite": True})
    run.score(other)
    assert len(lines(out)) == first["rows"]
    (tmp_path / "foreign.jsonl").write_text("mine")
    with pytest.raises(UserError, match="of unknown origin"):
        run.score(configure(model, data, tmp_path / "foreign.jsonl"))


def other_weights(chats, tmp_path) -> str:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(chats / "llama")
    with torch.no_grad():
        loaded.get_input_embeddings().weight[5, 3] += 1
    loaded.save_pretrained(tmp_path / "other")
    load_tokenizer(chats / "llama").save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_scores_are_added_to_scored_rows_under_another_name(tmp_path, model, data):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    compute_entropy_for_model(model, data, one, "entropy_0", report=False)
    with pytest.raises(UserError, match=r"one.jsonl line \d+: has a field entropy_0 already"):
        compute_entropy_for_model(model, one, two, "entropy_0", format="text")
    compute_entropy_for_model(model, one, two, "entropy_1", format="text", report=False)
    for row in lines(two):
        assert row["entropy_0"] == row["entropy_1"] if "text" in row else "error" in row
    assert all(line.count('"error"') <= 1 for line in two.read_text().splitlines())


def test_what_cannot_be_scored_is_said_before_the_model_is_loaded(tmp_path, model, data, monkeypatch):
    monkeypatch.setattr(run, "Scorer", None)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "short.jsonl").write_text('{"text": ""}\n{"text": 1}\n')
    out = tmp_path / "scores.jsonl"
    for flags, said in (
        ({"metric": ["entropie"]}, "metric 'entropie': must be one of .*did you mean entropy"),
        ({"data": [str(tmp_path / "missing.jsonl")]}, "no such file"),
        ({"data": [str(tmp_path / "short.jsonl")], "format": "text"}, r"none of the 2 rows can be scored \(empty 1"),
        ({"data": [str(tmp_path / "empty.jsonl")], "format": "text"}, "holds no row"),
        ({"max_length": 4096}, "has 128 positions"),
        ({"template": "none"}, "conversations need a chat template"),
        ({"field": ["a", "b"]}, "2 names for 1 metrics"),
        ({"out": str(tmp_path)}, "name a file for JSON lines"),
        ({"out": data[0], "data": [data[0]]}, "is both the input and the output"),
        ({"tokens_per_batch": 0}, "must be auto or a whole number"),
        ({"offload": True}, "set score.zero3=true"),
    ):
        with pytest.raises(UserError, match=said) as error:
            run.score(configure(model, **({"data": data, "out": out} | flags)))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"did you mean 'score\.max_length'"):
        options.load(None, ["score.max_lenght=3"])


@pytest.mark.skipif(FP16_HERE, reason="this device has fp16, so nothing refuses it")
def test_sharding_in_fp16_without_a_device_for_it_is_said_before_anything_is_read(tmp_path, model, data):
    half = {"zero3": True, "dtype": "fp16"}
    with pytest.raises(ConfigError, match=r"^score.dtype=fp16: .* no fp16 arithmetic on this .*; use bf16 or fp32$"):
        run.score(configure("nowhere/at/all", data, tmp_path / "scores.jsonl", **half))
    with pytest.raises(ConfigError, match=r"^dtype fp16: .* no fp16 arithmetic"):  # of a model saved in it
        Scorer(model, ["entropy"], **half)


def test_the_output_is_no_input_of_a_pattern(tmp_path, model, data):
    out = tmp_path / "scores.jsonl"
    pattern = [str(tmp_path)]
    rows = run.score(configure(model, pattern, out, format="text"))["rows"]
    out.unlink()
    assert run.score(configure(model, pattern, out, format="text", overwrite=True))["rows"] == rows


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path, model, data, monkeypatch):
    def grow(*arguments):
        with open(data[0], "a") as file:
            file.write('{"text": "red"}\n')
        return merge(*arguments)

    merge = run.merge
    monkeypatch.setattr(run, "merge", grow)
    with pytest.raises(UserError, match="changed while it was scored"):
        run.score(configure(model, data[:1], tmp_path / "scores.jsonl"))
    assert not (tmp_path / "scores.jsonl").exists()


def test_names_of_columns_in_the_output():
    names = [options.output_field(c, ["ifd", "router"], ["i0", "r0"]) for c in ("ifd", "router", "router_x", "other")]
    assert names == ["i0", "r0", "r0_x", "other"]
    assert options.output_field("router", ["router"], []) == "router"
