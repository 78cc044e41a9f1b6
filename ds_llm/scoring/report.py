"""The page of a scoring run: one self-contained HTML file, from one pass over the scored rows.

Counts and means are of all rows. Figures and quantiles are of a random sample of at most `SAMPLE_ROWS` rows, which
bounds the memory.
"""

from __future__ import annotations

import heapq
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice, zip_longest
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ds_llm.data.resumable import beside
from ds_llm.errors import UserError
from ds_llm.progress import progress
from ds_llm.report.page import render, save
from ds_llm.scoring import report_plots as plots
from ds_llm.scoring.metrics import METRICS
from ds_llm.scoring.report_template import PAGE

SAMPLE_ROWS = 200_000  # the figures are drawn from so many at most
SHOWN_ROWS, SHOWN_ERRORS = 8, 20
SHOWN_CHARACTERS, SHOWN_LINES, MOST_CHARACTERS = 300, 4, 6000  # of a text: folded, at most
MOST_PAIRS = 6  # of fields drawn against each other
STEP_ROWS = 1000  # between two looks at the progress
GUESS_ROWS = 100  # that tell which fields are scores, where none are named
COUNTS = ("idx", "line", "tokens", "length")  # numbers in a row that are no scores
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass
class Score:
    """Counts, moments and the rows at both ends of one field, from the pass over the rows."""

    name: str
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    lowest: list[tuple[float, int, str]] = field(default_factory=list)
    highest: list[tuple[float, int, str]] = field(default_factory=list)

    def add(self, value: float, row: int, record: dict) -> None:
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self.squares += step * (value - self.mean)
        for kept, key in ((self.lowest, -value), (self.highest, value)):
            if len(kept) < SHOWN_ROWS:
                heapq.heappush(kept, (key, -row, text_of(record)))
            elif (key, -row) > kept[0][:2]:
                heapq.heapreplace(kept, (key, -row, text_of(record)))

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0


class Collected:
    """The pass over the rows. `sample` float64 [rows drawn, fields + 1]: scores, NaN where a row has none, and its
    length in tokens."""

    def __init__(self, fields: Sequence[str]):
        self.scores = [Score(name) for name in fields]
        self.rows, self.errors, self.first_errors = 0, Counter(), []
        self._sample = np.full((1024, len(fields) + 1), np.nan)
        self._random = np.random.default_rng(0)

    def add(self, record: dict, length: int | None) -> None:
        values = [_number(record.get(score.name)) for score in self.scores]
        for score, value in zip(self.scores, values, strict=True):
            if not math.isnan(value):
                score.add(value, self.rows, record)
        if isinstance(error := record.get("error"), str) and all(map(math.isnan, values)):
            self.errors[error] += 1
            if len(self.first_errors) < SHOWN_ERRORS:
                self.first_errors.append((self.rows, error))
        # each row so far is in the sample with equal probability (Vitter, "Random sampling with a reservoir", 1985)
        place = self.rows if self.rows < SAMPLE_ROWS else int(self._random.integers(self.rows + 1))
        if place < SAMPLE_ROWS:
            if place >= len(self._sample):
                self._sample = np.concatenate([self._sample, np.full_like(self._sample, np.nan)])[:SAMPLE_ROWS]
            self._sample[place] = [*values, math.nan if length is None else length]
        self.rows += 1

    @property
    def sample(self) -> np.ndarray:
        return self._sample[: min(self.rows, SAMPLE_ROWS)]


def write_report(scores: Path | Sequence[Path], fields: Sequence[str], out: Path) -> Path:
    """Make the page `out` for the rows of `scores`; returns its path.

    scores: JSONL with one row per input row, or several such files of the same input, whose rows are taken together
    line by line. fields: names of the scores; empty: every number of the rows that is one. A row's length in tokens
    comes from `rows.parquet` in the folder of the first run that has left one beside its file. Raises `UserError` for
    files that are missing, damaged or of different inputs, and for fields that no row has.
    """
    paths = [Path(scores)] if isinstance(scores, (str, os.PathLike)) else [Path(path) for path in scores]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file; name the output of a scoring run")
    fields = list(fields) or _guess(paths)
    collected = Collected(fields)
    table = next((rows for path in paths if (rows := beside(path, ".d") / "rows.parquet").is_file()), None)
    lengths = _lengths(table) if table else iter(())
    count = pq.read_metadata(table).num_rows if table else None
    with progress("reading scores", count, "rows") as task:
        for record in _records(paths):
            collected.add(record, next(lengths, None))
            if collected.rows % STEP_ROWS == 0:
                task.advance(STEP_ROWS)
    if collected.rows and next(lengths, None) is not None:
        raise UserError(f"{paths[0]}: has fewer rows than were scored; run the scoring again")
    if not collected.rows:
        raise UserError(f"{paths[0]}: is empty")
    for score in collected.scores:
        if not score.count:
            raise UserError(f"{paths[0]}: no row has a number in '{score.name}'")
    return save(build(collected, paths), Path(out))


def build(collected: Collected, paths: list[Path]) -> str:
    """The page as text."""
    sample, scores = collected.sample, collected.scores
    lengths = sample[:, -1]
    figures = []
    for column, score in enumerate(scores):
        values = sample[:, column]
        figures.append((f"Distribution of {score.name}", plots.histogram(values, score.name)))
        if np.isfinite(lengths).any():
            figures.append((f"Length and {score.name}", plots.against(lengths, values, "tokens", score.name)))
    pairs = []
    for a, b in islice(combinations(range(len(scores)), 2), MOST_PAIRS):
        x, y, names = sample[:, a], sample[:, b], (scores[a].name, scores[b].name)
        alike = _metric(names[0]) is not None and _metric(names[0]) == _metric(names[1])
        pairs.append(
            {
                "title": f"{names[0]} and {names[1]}",
                "svg": plots.against(x, y, *names, diagonal=alike and plots.comparable(x, y)),
                "note": _relation(x, y, *names, alike),
            }
        )
    bad = sum(collected.errors.values())
    tiles = [("rows", f"{collected.rows:,}", ", ".join(path.name for path in paths), "")]
    tiles += [(f"mean {s.name}", f"{s.mean:.4g}", f"standard deviation {s.deviation:.3g}", "") for s in scores]
    tiles += [("rows without a score", f"{bad:,}", f"{bad / collected.rows:.2%} of all", "bad" if bad else "")]
    return render(
        PAGE,
        name=paths[0].stem,
        subtitle=", ".join(str(path) for path in paths),
        tiles=[dict(zip(("name", "value", "note", "tone"), tile, strict=True)) for tile in tiles],
        plots=[{"title": title, "svg": svg} for title, svg in figures],
        pairs=pairs,
        heads=["score", "rows", "mean", "deviation", *(f"{q:.0%}" for q in QUANTILES)],
        quantiles=[_summary(score, sample[:, column]) for column, score in enumerate(scores)],
        sampled=len(sample) if len(sample) < collected.rows else None,
        ends=[
            {"name": s.name, "groups": [("Lowest", _ends(s.lowest, -1)), ("Highest", _ends(s.highest, 1))]}
            for s in scores
        ],
        errors=collected.errors.most_common(),
        first_errors=[(row + 1, error) for row, error in collected.first_errors],
    )


def _summary(score: Score, values: np.ndarray) -> list[str]:
    quantiles = np.nanquantile(values, QUANTILES) if np.isfinite(values).any() else [math.nan] * len(QUANTILES)
    return [score.name, f"{score.count:,}", *(f"{v:.4g}" for v in (score.mean, score.deviation, *quantiles))]


def _ends(kept: list[tuple[float, int, str]], sign: int) -> list[dict]:
    """Rows at one end, the outermost first."""
    return [
        {"value": f"{sign * key:.5g}", "line": f"{1 - row:,}", **folded(text)} for key, row, text in sorted(kept)[::-1]
    ]


def folded(text: str) -> dict:
    """A text as a page shows it: with its beginning as one paragraph where it is long."""
    if len(text) <= SHOWN_CHARACTERS and text.count("\n") < SHOWN_LINES:
        return {"text": text}
    line = " ".join(text.split())
    cut = line.rfind(" ", SHOWN_CHARACTERS // 2, SHOWN_CHARACTERS)  # not where words are not parted by blanks
    return {"text": text, "beginning": line[: cut if cut > 0 else SHOWN_CHARACTERS]}


def _metric(name: str) -> str | None:
    """The metric that a field is named after, as entropy_0 is after entropy."""
    return max((m for m in METRICS if name == m or name.startswith(f"{m}_")), key=len, default=None)


def _relation(x: np.ndarray, y: np.ndarray, first: str, second: str, alike: bool) -> str:
    """How two scores of the rows are related; for scores of one metric also which one is lower."""
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if len(x) < 3:
        return ""
    ranks = [np.argsort(np.argsort(v, kind="stable"), kind="stable") for v in (x, y)]
    spread = min(np.std(x), np.std(y))
    found = [f"rank correlation {np.corrcoef(*ranks)[0, 1]:.3f}"] if spread > 0 else []
    if alike:
        found.append(f"{second} is below {first} in {np.mean(y < x):.1%} of the rows")
        found.append(f"the mean difference is {np.mean(y - x):.4g}")
    return "; ".join(found)


def text_of(record: dict) -> str:
    """The readable content of a row: its text, prompt and answer, or turns, cut to `MOST_CHARACTERS`."""
    turns = record.get("messages") or record.get("conversations")
    if isinstance(turns, list):
        parts = [
            f"{turn.get('role', turn.get('from', ''))}: {turn.get('content', turn.get('value', ''))}"
            for turn in turns
            if isinstance(turn, dict)
        ]
    else:
        parts = [value for value in record.values() if isinstance(value, str) and value != record.get("error")]
    text = "\n".join(parts)
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS].rstrip() + " …"


def _number(value) -> float:
    """A score; NaN for anything that is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return math.nan
    return float(value)


def _records(paths: list[Path]) -> Iterator[dict]:
    """Rows of all files together, line by line; a field that several have is the first one's."""
    files = [open(path, encoding="utf-8") for path in paths]  # noqa: SIM115
    try:
        for number, lines in enumerate(zip_longest(*files), 1):
            if None in lines:
                raise UserError(f"{paths[lines.index(None)]}: has fewer rows than the others; score the same data")
            merged: dict = {}
            for path, line in zip(paths, lines, strict=True):
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}: line {number}: not JSON ({error})") from None
                if not isinstance(record, dict):
                    raise UserError(f"{path}: line {number}: is not an object")
                merged |= {name: value for name, value in record.items() if name not in merged}
            yield merged
    finally:
        for file in files:
            file.close()


def _guess(paths: list[Path]) -> list[str]:
    """Names of the fields that hold scores: fractions, in the first rows."""
    found: dict[str, None] = {}
    for record in islice(_records(paths), GUESS_ROWS):
        found |= dict.fromkeys(k for k, v in record.items() if isinstance(v, float) and k not in COUNTS)
    if not found:
        raise UserError(f"{paths[0]}: no field of its first {GUESS_ROWS} rows holds a score; name the fields")
    return list(found)


def _lengths(table: Path) -> Iterator[int]:
    """Tokens of each row, from a run's `rows.parquet`."""
    with pq.ParquetFile(table) as file:
        for batch in file.iter_batches(columns=["length"]):
            yield from batch.column(0).to_pylist()
