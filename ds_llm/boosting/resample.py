"""Resamples rows with replacement, by the change of their entropy from one model to the next.

`adaboost` favours rows that a model has begun to learn. `brownboost` favours hard rows on which it improves, and less
those that stay hard or easy for long (after Freund 2001, "An adaptive version of the boost by majority algorithm").
`uniform` draws all rows alike, for comparison. Entropies are in nats; weights and probabilities are float64.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ds_llm.config.options import key
from ds_llm.data.resumable import dump, write_atomically
from ds_llm.data.rows import Reject, records, to_json
from ds_llm.data.sources import resolve
from ds_llm.errors import UserError
from ds_llm.progress import console, progress

NEEDS = {"adaboost": 2, "brownboost": 3, "uniform": 1}  # models whose entropies a method compares
EASY, HARD = 0.2, 0.8  # quantiles of the last entropies
TREND, LEAST_TREND, MOST_TREND = 0.5, 0.1, 10.0
ROUNDS = 2  # that a row may be hard, or easy, without a penalty
TINY = 1e-8
SHOWN = 5  # rows and groups in the report


@dataclass
class ResampleConfig:
    method: str = key("adaboost", "How rows are weighted", choices=("adaboost", "brownboost", "uniform"))
    multiplier: float = key(1.0, "Rows drawn, as a multiple of those there are", above=0)
    seed: int = key(0, "Seed of the draw", at_least=0)
    alpha: float | None = key(
        None, "adaboost: share of rows drawn by their first entropy (0.2); brownboost: exponent of difficulty (1)",
        at_least=0,
    )  # fmt: skip
    beta: float | None = key(
        None, "adaboost: share drawn by how much entropy fell (0.7); brownboost: exponent of the trend (1)", at_least=0
    )
    gamma: float | None = key(
        None, "adaboost: share drawn by how much entropy rose (0.1); brownboost: exponent of the time penalty (1)",
        at_least=0,
    )  # fmt: skip
    lambda_time: float = key(1.0, "brownboost: penalty for each round a row stayed hard beyond two", at_least=0)
    lambda_easy: float = key(1.0, "brownboost: penalty for each round a row stayed easy beyond two", at_least=0)

    def weights(self, entropies: Sequence[np.ndarray]) -> np.ndarray:
        """Probability of each row, float64 [n]. entropies: of each model in turn, [n] each; `UserError` if too few."""
        if len(entropies) < NEEDS[self.method]:
            raise UserError(
                f"{self.method} compares the entropies of {NEEDS[self.method]} models, {len(entropies)} are given"
            )
        given = {name: value for name in ("alpha", "beta", "gamma") if (value := getattr(self, name)) is not None}
        if self.method == "adaboost":
            return adaboost(entropies[0], entropies[1], **given)
        if self.method == "brownboost":
            penalties = {"lambda_time": self.lambda_time, "lambda_easy": self.lambda_easy}
            return brownboost(*entropies[:3], **given, **penalties)
        return _normalised(np.ones(len(entropies[0])))


def adaboost(h0: np.ndarray, h1: np.ndarray, alpha: float = 0.2, beta: float = 0.7, gamma: float = 0.1) -> np.ndarray:
    """Probabilities [n] from the entropies [n] before and after a training, with D = h1 - h0:
    alpha h0 / sum + beta max(-D, 0) / sum + gamma max(D, 0) / sum; a term whose sum is 0 is left out."""
    change = np.asarray(h1, np.float64) - np.asarray(h0, np.float64)
    terms = [np.asarray(h0, np.float64), np.maximum(-change, 0), np.maximum(change, 0)]
    parts = [w * t / t.sum() for w, t in zip((alpha, beta, gamma), terms, strict=True) if t.sum() > 0]
    return _normalised(sum(parts, np.zeros(len(change))))


def brownboost(
    h0: np.ndarray,
    h1: np.ndarray,
    h2: np.ndarray,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    lambda_time: float = 1.0,
    lambda_easy: float = 1.0,
) -> np.ndarray:
    """Probabilities [n] from the entropies [n] of three models in turn: d^alpha t^beta T^gamma E, normalised.

    q20 and q80 are quantiles of h2. d = clip((h2 - q20) / (q80 - q20), 0, 1), not less than 1e-8; t = clip(1 + (h0 -
    h2) / 2 std(h0 - h2), 0.1, 10); T = exp(-lambda_time max(0, r - 2)) with r how many of the row's three entropies are
    above q80; E = exp(-lambda_easy max(0, e - 2)) with e how many are below q20.
    """
    rounds = np.stack([h0, h1, h2]).astype(np.float64)
    easy, hard = np.quantile(rounds[2], (EASY, HARD))
    difficulty = np.clip((rounds[2] - easy) / max(hard - easy, TINY), 0, 1)
    gain = rounds[0] - rounds[2]
    trend = np.clip(1 + TREND * gain / max(gain.std(), TINY), LEAST_TREND, MOST_TREND)
    time = np.exp(-lambda_time * np.maximum(0, (rounds > hard).sum(0) - ROUNDS))
    ease = np.exp(-lambda_easy * np.maximum(0, (rounds < easy).sum(0) - ROUNDS))
    return _normalised(np.maximum(difficulty, TINY) ** alpha * trend**beta * time**gamma * ease)


def _normalised(weights: np.ndarray) -> np.ndarray:
    total = weights.sum()
    if not np.isfinite(total) or total <= 0:
        raise UserError("resampling: every row has the weight 0; are all entropies 0?")
    return weights / total


def draw(probabilities: np.ndarray, count: int, seed: int) -> np.ndarray:
    """How often each row is drawn in `count` draws with replacement: int64 [n]."""
    return np.random.default_rng(seed).multinomial(count, probabilities)


@dataclass
class Scores:
    """Rows with scores in all files: `idx` int64 [n] ascending, `values` float64 [n] per field. `missing`: number of
    rows with scores in only some of them."""

    idx: np.ndarray
    values: dict[str, np.ndarray]
    missing: int = 0


def merge(files: Mapping[str, str | os.PathLike]) -> Scores:
    """Join score files by `idx`. files: field -> JSON lines with `idx` and that field, as `launch/score.py --only-idx`
    writes them; a row with null or without the field (it could not be scored) is missing.

    Raises `UserError` for a line that is no such row, an `idx` that occurs twice, or files without a common row.
    """
    tables = {name: _read(name, Path(path)) for name, path in files.items()}
    every, common = None, None
    for idx, _ in tables.values():
        every = idx if every is None else np.union1d(every, idx)
        common = idx if common is None else np.intersect1d(common, idx, assume_unique=True)
    if common is None or not len(common):
        raise UserError(f"{', '.join(map(str, files.values()))}: no row is scored in all of them")
    values = {name: scores[np.searchsorted(idx, common)] for name, (idx, scores) in tables.items()}
    return Scores(common, values, len(every) - len(common))


def write(scores: Scores, out: str | os.PathLike) -> None:
    """Write joined scores as JSON lines with `idx` and the fields, as `merge` reads them."""
    columns = [scores.idx.tolist(), *(values.tolist() for values in scores.values.values())]
    names = ["idx", *scores.values]
    partial = Path(out).with_name(f".{Path(out).name}.partial")
    with open(partial, "wb") as file:
        for row in zip(*columns, strict=True):
            file.write(to_json(dict(zip(names, row, strict=True))) + b"\n")
    os.replace(partial, out)


def _read(name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    idx, scores = [], []
    for source in resolve([path]):
        for _, batch in source.batches():
            for item in records(batch):
                if isinstance(item, Reject):
                    raise UserError(f"{path} line {item.number}: {item.reason} ({item.detail})")
                number, row = item
                if not isinstance(row.get("idx"), int):
                    raise UserError(f"{path} line {number}: has no idx")
                value = row.get(name)
                if isinstance(value, (int, float)):
                    idx.append(row["idx"])
                    scores.append(value)
    if not idx:
        raise UserError(f"{path}: no row has a number in the field {name}")
    idx, scores = np.array(idx, np.int64), np.array(scores, np.float64)
    order = np.argsort(idx, kind="stable")
    idx, scores = idx[order], scores[order]
    if len(double := idx[1:][idx[1:] == idx[:-1]]):
        raise UserError(f"{path}: idx {double[0]} occurs more than once")
    return idx, scores


@dataclass
class Report:
    """Statistics of the draws.

    distribution: number of draws -> rows. effective: 1 / sum p^2, the effective number of rows. groups: fifths of the
    rows by change of entropy from the first model to the last, with their mean draws. most: the rows drawn most often.
    """

    method: str
    rows: int
    missing: int
    drawn: int
    distinct: int
    effective: float
    distribution: dict[int, int]
    entropy: dict[str, list[float]]  # field -> mean over all rows, mean over draws
    groups: list[dict] = field(default_factory=list)
    most: list[dict] = field(default_factory=list)


def resample(
    data: Sequence[str | os.PathLike], scores: Scores, out: str | os.PathLike, config: ResampleConfig
) -> Report:
    """Write the drawn rows to `out`, JSON lines in the order of the input, each as often as it was drawn.

    data: the scored data; `idx` is a row's number in it, from 0. Also writes OUT.draws.parquet (idx, weight, draws and
    entropies of every row) and OUT.report.json. Rows without all scores are never drawn, and counted. Raises
    `UserError` where the data has fewer rows than were scored.
    """
    out, entropies = Path(out), list(scores.values.values())
    weights = config.weights(entropies)
    draws = draw(weights, int(len(weights) * config.multiplier), config.seed)
    if not draws.sum():
        raise UserError(f"resample.multiplier: {config.multiplier:g} of {len(weights):,} rows is not one row")
    out.parent.mkdir(parents=True, exist_ok=True)
    shown = set(scores.idx[np.argsort(-draws, kind="stable")[:SHOWN]].tolist())
    texts = _write(data, scores.idx, draws, out, shown)
    report = _report(config, scores, weights, draws, texts)
    table = {"idx": scores.idx, "weight": weights, "draws": draws, **scores.values}
    pq.write_table(pa.table(table), out.with_name(f"{out.name}.draws.parquet"))
    write_atomically(out.with_name(f"{out.name}.report.json"), dump(asdict(report)))
    return report


def _write(data, idx: np.ndarray, draws: np.ndarray, out: Path, shown: set[int]) -> dict[int, str]:
    """Write the rows; returns the text of those in `shown`."""
    partial, texts = out.with_name(f".{out.name}.partial"), {}
    times = dict(zip(idx[draws > 0].tolist(), draws[draws > 0].tolist(), strict=True))
    row = 0
    sources = resolve(data)
    with open(partial, "wb") as file, progress("resampling", total=sum(s.size for s in sources), unit="B") as task:
        for source in sources:
            for _, batch in source.batches():
                for item in records(batch):
                    count = times.get(row, 0)
                    if count and isinstance(item, Reject):
                        raise UserError(f"{source.name} row {item.number}: {item.reason}, but it has scores")
                    if count:
                        file.write((to_json(item[1]) + b"\n") * count)
                    if row in shown and not isinstance(item, Reject):
                        texts[row] = json.dumps(item[1], ensure_ascii=False)[:200]
                    row += 1
                task.advance(batch.disk)
    if row <= idx[-1]:
        partial.unlink()
        raise UserError(f"{', '.join(map(str, data))}: {row:,} rows, but the scores go up to idx {idx[-1]}")
    os.replace(partial, out)
    return texts


def _report(config: ResampleConfig, scores: Scores, weights, draws, texts: dict[int, str]) -> Report:
    entropies, rows = list(scores.values.values()), len(draws)
    times, counts = np.unique(draws, return_counts=True)
    groups = []
    change = entropies[-1] - entropies[0]
    for part in np.array_split(np.argsort(change, kind="stable"), min(SHOWN, rows)):
        groups.append({
            "change": [float(change[part].min()), float(change[part].max())],
            "entropies": [float(h[part].mean()) for h in entropies],
            "draws": float(draws[part].mean()),
            "never": float((draws[part] == 0).mean()),
        })  # fmt: skip
    most = [
        {
            "idx": int(scores.idx[i]),
            "draws": int(draws[i]),
            "weight": float(weights[i]),
            "entropies": [float(h[i]) for h in entropies],
            "row": texts.get(int(scores.idx[i]), ""),
        }
        for i in np.argsort(-draws, kind="stable")[:SHOWN]
    ]
    return Report(
        config.method,
        rows,
        scores.missing,
        int(draws.sum()),
        int((draws > 0).sum()),
        float(1 / (weights**2).sum()),
        dict(zip(times.tolist(), counts.tolist(), strict=True)),
        {name: [float(h.mean()), float((h * draws).sum() / draws.sum())] for name, h in scores.values.items()},
        groups,
        most,
    )


def show(report: Report) -> None:
    """Print a report as tables."""
    from rich.table import Table

    line = f"{report.method}: {report.drawn:,} draws from {report.rows:,} rows, {report.distinct:,} of them drawn"
    if report.missing:
        line += f"; {report.missing:,} rows without all scores left out"
    console.print(f"{line}; as uneven as drawing from {report.effective:,.0f} equal rows")
    table = Table("times drawn", *(str(n) for n in sorted(report.distribution)), box=None)
    table.add_row("rows", *(f"{report.distribution[n]:,}" for n in sorted(report.distribution)))
    console.print(table)
    table = Table("fifth of the rows by change of entropy", *report.entropy, "mean draws", "never drawn", box=None)
    for group in report.groups:
        low, high = group["change"]
        means = (f"{value:.4f}" for value in group["entropies"])
        table.add_row(f"{low:+.4f} to {high:+.4f}", *means, f"{group['draws']:.2f}", f"{group['never']:.0%}")
    console.print(table)
