"""Preference pairs: which tokens count, what is dropped and why, the store and its batches."""

import json

import numpy as np
import pytest

from ds_llm.data.pairs import encode_pair, prepare_pairs
from ds_llm.data.tokenizer import train_tokenizer
from ds_llm.errors import UserError

STOCK = (  # a template that does not mark its answers and moves the system message
    "{% if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    text = "what is the capital of France? Paris is the capital, of course. no idea at all"
    (folder / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    train_tokenizer([folder / "text.jsonl"], folder / "out", vocab_size=300)
    return AutoTokenizer.from_pretrained(folder / "out")


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def trained_text(tokenizer, side) -> str:
    return tokenizer.decode([i for i, t in zip(side.input_ids, side.trained, strict=True) if t])


QUESTION = "What is the capital of France?"
ROWS = [  # the same pair in every shape
    {"prompt": QUESTION, "chosen": "Paris", "rejected": "Parma"},
    {"prompt": [user(QUESTION)], "chosen": [said("Paris")], "rejected": [said("Parma")]},
    {"prompt": QUESTION, "chosen": [user(QUESTION), said("Paris")], "rejected": [user(QUESTION), said("Parma")]},
    {"chosen": [user(QUESTION), said("Paris")], "rejected": [user(QUESTION), said("Parma")]},
]


@pytest.mark.parametrize("template", [None, STOCK])
@pytest.mark.parametrize("row", ROWS)
def test_answers_alone_count(tokenizer, row, template):
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template = template or original
        for side, answer in zip(encode_pair(row, tokenizer), ("Paris", "Parma"), strict=True):
            assert trained_text(tokenizer, side) == f"{answer}<|im_end|>"
            whole = tokenizer.apply_chat_template([user(QUESTION), said(answer)], tokenize=False)
            assert tokenizer.decode(side.input_ids) == whole
    finally:
        tokenizer.chat_template = original


def test_answers_shared_by_both_belong_to_the_prompt(tokenizer):
    start = [{"role": "system", "content": "Be brief."}, user("hi"), said("hello"), user(QUESTION)]
    row = {
        "chosen": [*start, said("Paris"), user("sure?"), said("of course")],
        "rejected": [*start, said("no idea")],
    }
    chosen, rejected = encode_pair(row, tokenizer)
    assert trained_text(tokenizer, chosen) == "Paris<|im_end|>of course<|im_end|>"
    assert trained_text(tokenizer, rejected) == "no idea<|im_end|>"


def test_plain_texts(tokenizer):
    row = {"chosen": f"Q: {QUESTION} A: Paris, of course", "rejected": f"Q: {QUESTION} A: Parma"}
    chosen, rejected = encode_pair(row, tokenizer)
    assert trained_text(tokenizer, chosen) == " Paris, of course<|im_end|>"
    assert trained_text(tokenizer, rejected) == " Parma<|im_end|>"
    for side, text in ((chosen, row["chosen"]), (rejected, row["rejected"])):
        assert tokenizer.decode(side.input_ids) == text + "<|im_end|>"


def write(path, rows) -> list[str]:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return [str(path)]


BAD = [
    (3, "bad JSON", "{"),
    (4, "missing field", {"text": "no pair"}),
    (5, "same answers", {"prompt": "a", "chosen": "b", "rejected": "b"}),
    (7, "no answer", {"prompt": "a", "chosen": [said("b")], "rejected": [user("b")]}),
    (8, "same answers", {"prompt": "a", "chosen": "x" * 60 + "1", "rejected": "x" * 60 + "2"}),
    (9, "cut off", {"prompt": "p" * 60, "chosen": "x", "rejected": "y"}),
]


def test_counts_what_is_dropped_with_its_line(tokenizer, tmp_path, capsys):
    rows = [ROWS[0], {"prompt": "a", "chosen": "x" * 60, "rejected": "y" * 4}]
    rows += [r for _, _, r in BAD[:3]] + [ROWS[1]] + [r for _, _, r in BAD[3:]]
    source = write(tmp_path / "pairs.jsonl", rows)
    pairs = prepare_pairs(source, tokenizer, max_length=50, cache=tmp_path / "cache")
    report = pairs.report
    assert (report.rows, len(pairs), report.truncated) == (9, 3, 1)
    expected = {}
    for line, reason, _ in BAD:
        entry = expected.setdefault(reason, [0, []])
        entry[0] += 1
        entry[1].append(f"pairs.jsonl:{line}")
    assert report.dropped == expected
    out = capsys.readouterr().out
    assert "3 pairs of 9 rows" in out
    assert "1 bad JSON (pairs.jsonl:3)" in out and "2 same answers (pairs.jsonl:5, pairs.jsonl:8)" in out
    rejects = [json.loads(line) for line in (pairs.folder / "rejects.jsonl").read_text().splitlines()]
    assert [(r["file"], r["line"], r["reason"]) for r in rejects] == [(source[0], n, reason) for n, reason, _ in BAD]
    assert report.tokens == pairs.lengths.sum() and report.longest == pairs.lengths.max() == 50
    learned = sum((labels != -100).sum() for i in range(3) for _, labels in pairs.pair(i))
    assert report.answer_tokens == learned
    dropped = prepare_pairs(source, tokenizer, max_length=50, truncate="drop", cache=tmp_path / "cache")
    assert len(dropped) == 2 and dropped.report.dropped["too long"][0] == 3
    with pytest.raises(UserError, match="no preference pair to train on; 5 too long"):
        prepare_pairs(source, tokenizer, max_length=8, truncate="drop", cache=tmp_path / "cache")


def test_batches_hold_the_stored_pairs(tokenizer, tmp_path):
    random = np.random.default_rng(0)
    words = lambda: "".join(random.choice(list("abcdefgh "), random.integers(1, 40))) + "."  # noqa: E731
    rows = [{"prompt": words(), "chosen": words(), "rejected": words()} for _ in range(30)]
    source = write(tmp_path / "pairs.jsonl", rows)
    pairs = prepare_pairs(source, tokenizer, max_length=200, cache=tmp_path / "cache")
    assert len(pairs) == 30
    picks = random.permutation(30)[:7]
    batch = pairs.batch(picks)
    assert batch["index"].tolist() == picks.tolist()
    for place, i in enumerate(picks):
        for row, answer in ((place, "chosen"), (place + 7, "rejected")):
            ids, labels, mask = (batch[n][row].numpy() for n in ("input_ids", "labels", "attention_mask"))
            length = mask.sum()
            assert mask[:length].all() and (ids[length:] == tokenizer.pad_token_id).all()
            assert (labels[length:] == -100).all()
            learned = labels != -100
            assert tokenizer.decode(labels[learned]) == rows[i][answer] + "<|im_end|>"
            whole = tokenizer.apply_chat_template([user(rows[i]["prompt"]), said(rows[i][answer])], return_dict=True)[
                "input_ids"
            ]
            full = [*ids[:length], labels[length - 1] if labels[length - 1] != -100 else whole[-1]]
            assert full == whole


def test_is_built_once_and_again_when_anything_changes(tokenizer, tmp_path, monkeypatch):
    source, cache = write(tmp_path / "pairs.jsonl", ROWS), tmp_path / "cache"
    first = prepare_pairs(source, tokenizer, max_length=64, cache=cache)
    monkeypatch.setattr("ds_llm.data.answers._build", lambda *_: pytest.fail("built again"))
    again = prepare_pairs(source, tokenizer, max_length=64, cache=cache)
    assert again.fingerprint == first.fingerprint and np.array_equal(again.lengths, first.lengths)
    monkeypatch.undo()
    longer = prepare_pairs(source, tokenizer, max_length=65, cache=cache)
    assert longer.folder != first.folder and longer.fingerprint == first.fingerprint
    write(tmp_path / "pairs.jsonl", ROWS[:2])
    changed = prepare_pairs(source, tokenizer, max_length=64, cache=cache)
    assert len(changed) == 2 and changed.fingerprint != first.fingerprint


def test_several_workers_give_the_same(tokenizer, tmp_path, monkeypatch):
    rows = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(300)]
    source = write(tmp_path / "pairs.jsonl", rows)
    one = prepare_pairs(source, tokenizer, max_length=64, cache=tmp_path / "one")
    monkeypatch.setattr("ds_llm.data.answers.BYTES_PER_WORKER", 1)
    monkeypatch.setattr("ds_llm.data.files.read.__defaults__", (2000,))
    monkeypatch.setattr("ds_llm.data.answers.available_cpus", lambda: 2)
    two = prepare_pairs(source, tokenizer, max_length=64, cache=tmp_path / "two")
    assert len(one) == 300 and one.fingerprint == two.fingerprint
