"""BLEU, chrF and ROUGE against the published packages called directly."""

import importlib.util
import random

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from ds_llm.config import text_metrics
from ds_llm.config.text_metrics import check_metrics
from ds_llm.errors import UserError
from ds_llm.evaluation.text_metrics import compare, signatures

WORDS = ["The", "cat's", "cats", "ran,", "running", "3.5", "miles", "A", "road.", "Roads", "(wet)", "and", "red!"]
CHARACTERS = "天地玄黄宇宙洪荒日月盈昃"


def changed(words: list[str], among) -> list[str]:
    """The words with some replaced, and perhaps an end cut off."""
    words = [random.choice(among) if random.random() < 0.2 else word for word in words]
    return words[: random.randint(len(words) // 2, len(words))]


@pytest.fixture
def pairs() -> tuple[list[str], list[str]]:
    """Texts, one of them empty, and references."""
    references = [random.choices(WORDS, k=random.randint(4, 20)) for _ in range(12)]
    texts = [changed(words, WORDS) for words in references]
    return ["", *map(" ".join, texts)], ["The end.", *map(" ".join, references)]


def test_figures_are_those_of_the_packages(pairs):
    texts, references = pairs
    found = compare(texts, references, ["rouge", "chrf", "bleu"])
    assert list(found) == ["bleu", "chrf", "rouge1", "rouge2", "rougeL"] == list(text_metrics.LABELS)
    assert found["bleu"] == sacrebleu.corpus_bleu(texts, [references]).score > 1
    assert found["chrf"] == sacrebleu.corpus_chrf(texts, [references]).score
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rows = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert found[name] == pytest.approx(100 * sum(row[name].fmeasure for row in rows) / len(rows), rel=1e-12)
    assert compare(texts, references, ["bleu"]) == {"bleu": found["bleu"]}
    assert compare(references, references, ["bleu", "rouge"])["rouge2"] == pytest.approx(100)


def test_chinese_is_compared_by_characters():
    references = [random.choices(CHARACTERS, k=random.randint(5, 15)) for _ in range(8)]
    texts = [changed(words, CHARACTERS) for words in references]
    chinese = [["".join(words) for words in side] for side in (texts, references)]
    letters = {character: f"w{number}" for number, character in enumerate(CHARACTERS)}  # the stemmer leaves them alone
    latin = [[" ".join(letters[c] for c in words) for words in side] for side in (texts, references)]
    assert compare(*chinese, ["bleu", "rouge"], "zh") == pytest.approx(compare(*latin, ["bleu", "rouge"]))
    assert compare(*chinese, ["rouge"])["rouge1"] == 0 < compare(*chinese, ["rouge"], "char")["rougeL"]


def test_the_signature_tells_how_a_figure_came_about():
    found = signatures(["bleu", "chrf", "rouge"], "zh")
    assert f"tok:zh|smooth:exp|version:{sacrebleu.__version__}" in found["bleu"]
    assert found["chrf"].startswith("nrefs:1|") and "words:zh|stemmer:none" in found["rouge"]
    assert "stemmer:porter" in signatures(["rouge"])["rouge"]


def test_what_cannot_be_computed_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="here: 'meteor' is not one of bleu, chrf, rouge"):
        check_metrics(["bleu", "meteor"], "13a", "here")
    with pytest.raises(UserError, match="here: tokenizer 'words' is not one of 13a"):
        check_metrics(["bleu"], "words", "here")
    missing = "sacrebleu"
    find = importlib.util.find_spec
    monkeypatch.setattr(text_metrics, "find_spec", lambda name: None if name == missing else find(name))
    for names, words in ((["bleu"], "13a"), (["rouge"], "zh")):
        with pytest.raises(UserError, match=rf"here: {names[0]} needs a package .* pip install 'ds_llm\[metrics\]'"):
            check_metrics(names, words, "here")
    check_metrics(["rouge"], "13a", "here")
    missing = "rouge_score"
    check_metrics(["bleu", "chrf"], "zh", "here")
    with pytest.raises(UserError, match="here: rouge needs a package"):
        check_metrics(["bleu", "rouge"], "13a", "here")
