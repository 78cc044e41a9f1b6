"""The page of a scoring run: what is on it is what the rows say."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_llm.errors import UserError
from ds_llm.scoring import report
from ds_llm.scoring.report import Collected, text_of, write_report

RANDOM = np.random.default_rng()


def rows(count: int) -> list[dict]:
    first = RANDOM.normal(3, 0.5, count).round(6)
    second = first - RANDOM.normal(0.2, 0.1, count).round(6)
    return [
        {"text": f"<b>passage {i}</b>", "id": i, "entropy_0": float(a), "entropy_1": float(b)}
        for i, (a, b) in enumerate(zip(first, second, strict=True))
    ]


def write(path, found: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_page_shows_the_ends_the_errors_and_no_other_host(tmp_path):
    found = rows(300)
    found[7] = {"text": "", "entropy_0": None, "entropy_1": None, "error": "nothing to score"}
    path = write(tmp_path / "scores.jsonl", found)
    (tmp_path / "scores.jsonl.d").mkdir()
    lengths = pa.array(RANDOM.integers(5, 500, 300), pa.int32())
    pq.write_table(pa.table({"length": lengths}), tmp_path / "scores.jsonl.d" / "rows.parquet")
    page = write_report(path, ["entropy_0", "entropy_1"], tmp_path / "report.html").read_text()
    assert "//" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page) and "<script" not in page
    assert "Length and entropy_1" in page and "entropy_0 and entropy_1" in page
    assert "nothing to score" in page and "0.33% of all" in page
    assert "&lt;b&gt;passage" in page and "<b>passage" not in page
    scored = sorted((row for row in found if "error" not in row), key=lambda row: row["entropy_0"])
    shown = re.findall(r'<td class="number">([\d,]+)</td>\s*<td class="text">&lt;b&gt;passage (\d+)', page)
    assert all(int(row.replace(",", "")) == int(name) + 1 for row, name in shown)
    ends = [int(name) for _, name in shown[: 2 * report.SHOWN_ROWS]]
    outermost = scored[: report.SHOWN_ROWS] + scored[: -report.SHOWN_ROWS - 1 : -1]
    assert ends == [row["id"] for row in outermost]
    table = page[page.index('id="quantiles"') :]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", table)[:9]
    values = np.array([row["entropy_0"] for row in scored])
    quantiles = np.quantile(values, report.QUANTILES)
    assert cells[:2] == ["entropy_0", "299"]
    assert [float(cell) for cell in cells[2:]] == pytest.approx([values.mean(), values.std(), *quantiles], rel=1e-3)


def test_files_of_the_same_input_are_read_together(tmp_path):
    both = rows(40)
    paths = [
        write(tmp_path / f"{name}.jsonl", [{"text": row["text"], name: row[name]} for row in both])
        for name in ("entropy_0", "entropy_1")
    ]
    page = write_report(paths, [], tmp_path / "report.html").read_text()
    share = np.mean([row["entropy_1"] < row["entropy_0"] for row in both])
    assert f"entropy_1 is below entropy_0 in {share:.1%} of the rows" in page
    write(paths[1], both[:-1])
    with pytest.raises(UserError, match=r"entropy_1.jsonl: has fewer rows"):
        write_report(paths, [], tmp_path / "report.html")


def test_memory_is_bounded_by_a_sample_that_every_row_may_be_in(monkeypatch):
    monkeypatch.setattr(report, "SAMPLE_ROWS", 500)
    collected = Collected(["score"])
    for i in range(5000):
        collected.add({"score": float(i), "text": ""}, i)
    sample = collected.sample
    assert sample.shape == (500, 2) and len(np.unique(sample[:, 0])) == 500
    assert abs(sample[:, 0].mean() - 2499.5) < 6 * 1443 / np.sqrt(500)
    assert collected.scores[0].mean == pytest.approx(2499.5)
    assert collected.scores[0].deviation == pytest.approx(np.arange(5000).std())


def test_mistakes_are_said(tmp_path):
    path = write(tmp_path / "scores.jsonl", rows(5))
    for given, fields, reason in (
        (tmp_path / "none.jsonl", [], "no such file"),
        (path, ["entropy_2"], "no row has a number in 'entropy_2'"),
        (write(tmp_path / "plain.jsonl", [{"text": "a", "idx": 1}]), [], "name the fields"),
        (write(tmp_path / "empty.jsonl", []), ["entropy"], "is empty"),
    ):
        with pytest.raises(UserError, match=reason):
            write_report(given, fields, tmp_path / "report.html")
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "entropy": 1.5}\n[1]\n')
    with pytest.raises(UserError, match="line 2: is not an object"):
        write_report(tmp_path / "bad.jsonl", ["entropy"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_few_equal_and_extreme_scores_have_a_page_too(tmp_path):
    for name, values in (("one", [2.5]), ("equal", [1.0] * 30), ("far", [1e-9, 1e12, 3.5])):
        path = write(tmp_path / f"{name}.jsonl", [{"text": "a", "entropy_0": value} for value in values])
        assert "Distribution of entropy_0" in write_report(path, [], tmp_path / f"{name}.html").read_text()
    path = write(tmp_path / "two.jsonl", [{"a": 1.5, "b": 2.5}, {"a": None, "b": 3.5}, {"a": 0.5, "b": None}])
    assert "a and b" in write_report(path, [], tmp_path / "two.html").read_text()


def test_long_texts_are_folded_and_only_scores_of_one_metric_are_subtracted(tmp_path):
    texts = ["short", "a word " * 200, "\n".join("abcdefgh"), "字" * 900]
    found = [{"text": t, "entropy_0": 1.5 + i, "entropy_1": 2.5, "perplexity": 4.5} for i, t in enumerate(texts)]
    page = write_report(write(tmp_path / "scores.jsonl", found), [], tmp_path / "report.html").read_text()
    folded = re.findall(r"<details><summary><span>([^<]*) …</span></summary>([^<]*)</details>", page)
    assert len(folded) == 3 * 3 * 2  # at both ends of each score
    assert {text for _, text in folded} == set(texts[1:])
    for beginning, text in folded:
        assert " ".join(text.split()).startswith(beginning) and len(beginning) <= report.SHOWN_CHARACTERS
    assert '<td class="text">short</td>' in page
    assert "entropy_1 is below entropy_0 in 50.0%" in page and page.count("the mean difference is") == 1


def test_text_of_rows_of_every_format():
    assert text_of({"text": "a b", "entropy": 1.0, "error": "x"}) == "a b"
    assert text_of({"prompt": "Why?", "completion": "So."}) == "Why?\nSo."
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert text_of({"messages": turns}) == "user: Hi\nassistant: Ho"
    assert text_of({"text": "x " * 5000}) == ("x " * (report.MOST_CHARACTERS // 2)).rstrip() + " …"
