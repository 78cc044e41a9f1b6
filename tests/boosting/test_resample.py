"""Weights against their formulas row by row in float64, draws against their probabilities, and what is refused."""

import json
import math
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from ds_llm.boosting.resample import ResampleConfig, adaboost, brownboost, draw, merge, resample, write
from ds_llm.errors import UserError


def entropies(count: int = 3, rows: int = 200) -> list[np.ndarray]:
    return [np.random.default_rng().gamma(2.0, 1.0, rows) for _ in range(count)]


def quantile(values: list[float], share: float) -> float:
    """Linear interpolation between the ordered values."""
    ordered, place = sorted(values), share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def test_adaboost_weights():
    h0, h1 = entropies(2)
    a, b, g = np.random.default_rng().random(3)
    found = adaboost(h0, h1, a, b, g)
    fall = math.fsum(max(x - y, 0) for x, y in zip(h0, h1, strict=True))
    rise = math.fsum(max(y - x, 0) for x, y in zip(h0, h1, strict=True))
    raw = [
        a * x / math.fsum(h0) + b * max(x - y, 0) / fall + g * max(y - x, 0) / rise for x, y in zip(h0, h1, strict=True)
    ]
    np.testing.assert_allclose(found, np.array(raw) / math.fsum(raw), rtol=1e-12)
    default = adaboost(h0, h1)
    np.testing.assert_allclose(default, adaboost(h0, h1, 0.2, 0.7, 0.1))
    assert found.sum() == pytest.approx(1)


def test_adaboost_without_any_change_follows_the_first_entropy():
    (h0,) = entropies(1)
    np.testing.assert_allclose(adaboost(h0, h0), h0 / h0.sum())


def test_brownboost_weights():
    h0, h1, h2 = entropies()
    a, b, g, slow, easy = np.random.default_rng().random(5) * 2
    found = brownboost(h0, h1, h2, a, b, g, slow, easy)
    low, high = quantile(list(h2), 0.2), quantile(list(h2), 0.8)
    gains = [x - z for x, z in zip(h0, h2, strict=True)]
    mean = math.fsum(gains) / len(gains)
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in gains) / len(gains))
    raw = []
    for x, y, z in zip(h0, h1, h2, strict=True):
        d = max(min(max((z - low) / (high - low), 0), 1), 1e-8)
        t = min(max(1 + 0.5 * (x - z) / spread, 0.1), 10)
        hard = sum(v > high for v in (x, y, z))
        light = sum(v < low for v in (x, y, z))
        raw.append(d**a * t**b * math.exp(-slow * max(0, hard - 2)) ** g * math.exp(-easy * max(0, light - 2)))
    np.testing.assert_allclose(found, np.array(raw) / math.fsum(raw), rtol=1e-9)


def test_draws_follow_the_probabilities_and_the_seed():
    weights = adaboost(*entropies(2, 20))
    many = draw(weights, 200_000, 3)
    assert many.sum() == 200_000 and np.array_equal(many, draw(weights, 200_000, 3))
    assert not np.array_equal(many, draw(weights, 200_000, 4))
    np.testing.assert_allclose(many / many.sum(), weights, atol=5 * math.sqrt(0.25 / 200_000))


@pytest.fixture
def scored(tmp_path):
    """Rows, and a score file for each of three models; row 3 has no score, and the files are in different orders."""
    rows = [{"text": f"row {i} ü"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:25]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[25:]))
    values, files = entropies(3, 40), {}
    for k, scores in enumerate(values):
        lines = [{"idx": i, f"entropy_{k}": None if i == 3 and k else float(h)} for i, h in enumerate(scores)]
        np.random.default_rng().shuffle(lines)
        files[f"entropy_{k}"] = tmp_path / f"s{k}.jsonl"
        files[f"entropy_{k}"].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rows, values, files


@pytest.mark.parametrize("method", ["adaboost", "brownboost", "uniform"])
def test_rows_are_written_as_often_as_they_were_drawn(scored, method, tmp_path):
    rows, values, files = scored
    scores = merge(files)
    assert scores.idx.tolist() == [i for i in range(40) if i != 3] and scores.missing == 1
    for k, name in enumerate(files):
        np.testing.assert_array_equal(scores.values[name], values[k][scores.idx])
    write(scores, tmp_path / "joined.jsonl")
    again = merge(dict.fromkeys(files, tmp_path / "joined.jsonl"))
    np.testing.assert_array_equal(again.values["entropy_2"], scores.values["entropy_2"])
    config = ResampleConfig(method=method, multiplier=2.5, seed=7)
    out = tmp_path / "out" / "drawn.jsonl"
    report = resample([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], scores, out, config)
    drawn = Counter(json.loads(line)["text"] for line in out.read_text().splitlines())
    table = pq.read_table(tmp_path / "out" / "drawn.jsonl.draws.parquet").to_pydict()
    expected = draw(config.weights(list(scores.values.values())), int(39 * 2.5), 7)
    assert table["draws"] == expected.tolist()
    assert drawn == Counter({rows[i]["text"]: n for i, n in zip(table["idx"], table["draws"], strict=True) if n})
    assert report.drawn == 97 == sum(n * c for n, c in report.distribution.items())
    assert report.distinct == len(drawn) and report.most[0]["draws"] == max(drawn.values())
    assert rows[report.most[0]["idx"]]["text"] in report.most[0]["row"]
    assert sum(report.distribution.values()) == 39
    assert json.loads((tmp_path / "out" / "drawn.jsonl.report.json").read_text())["method"] == method
    if method == "uniform":
        assert report.effective == pytest.approx(39)
    first = out.read_bytes()
    resample([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], scores, out, config)
    assert out.read_bytes() == first


def test_what_does_not_belong_together_is_refused(scored, tmp_path):
    _, _, files = scored
    two = merge({k: files[k] for k in ("entropy_0", "entropy_1")})
    with pytest.raises(UserError, match="compares the entropies of 3 models, 2 are given"):
        resample([tmp_path / "a.jsonl"], two, tmp_path / "x.jsonl", ResampleConfig(method="brownboost"))
    with pytest.raises(UserError, match="25 rows, but the scores go up to idx 39"):
        resample([tmp_path / "a.jsonl"], two, tmp_path / "x.jsonl", ResampleConfig())
    assert not (tmp_path / "x.jsonl").exists()
    with pytest.raises(UserError, match="field entropy_9"):
        merge({"entropy_9": files["entropy_0"]})
    with open(files["entropy_1"], "a") as file:
        file.write('{"idx": 5, "entropy_1": 0.5}\n')
    with pytest.raises(UserError, match="idx 5 occurs more than once"):
        merge(files)
    files["entropy_1"].write_text("{}\n")
    with pytest.raises(UserError, match=r"s1\.jsonl line 1: has no idx"):
        merge(files)
