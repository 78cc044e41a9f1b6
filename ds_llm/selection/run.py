"""Selects rows to train on, in three stages: scores and router features, clusters, the pick. A stage is not repeated
while its inputs are unchanged.

OUTPUT/
    scores.jsonl, scores.jsonl.d/   quality and router features of every row, see `ds_llm.scoring.run`
    clusters.npy, clusters.json     int32 [rows], `UNUSABLE` for rows without features; how it went
    selected_data.jsonl             the picked rows, as they were, in the order of the data
    random_data.jsonl               as many rows drawn at random, to compare with
    rows.parquet                    idx, quality, cluster, picked, order (of the pick, from 0) of every row
    report.html, report.json        the page about the pick, and its figures
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ds_llm.data.resumable import beside, dump, write_atomically
from ds_llm.distributed.environment import rank
from ds_llm.distributed.interrupt import Interrupt
from ds_llm.errors import UserError
from ds_llm.files import lock
from ds_llm.progress import console, progress
from ds_llm.scoring import manifest as jobs
from ds_llm.scoring.manifest import Job
from ds_llm.scoring.merge import input_lines
from ds_llm.scoring.run import score
from ds_llm.selection import options, pick, report
from ds_llm.selection.clustering import UNUSABLE, Clustering, cluster
from ds_llm.selection.features import Features
from ds_llm.selection.options import SelectionConfig
from ds_llm.selection.spherical import joined

VERSION = 1  # of what clusters and picks are computed from; other results are made anew
STEP_ROWS = 1000  # between two looks at the progress


def select(config: SelectionConfig, interrupt: Interrupt | None = None, overwrite: bool = False) -> dict | None:
    """Select rows; every rank of a job calls it. Returns the content of report.json on rank 0, None elsewhere.

    interrupt: lets scoring save before it stops; the later stages are short and stop at once. overwrite: replace scores
    of another model, other data or other options. After any end the same call continues. Raises `UserError` where rows
    cannot be scored or clustered, and where so few are usable that none would be picked.
    """
    options.check(config)
    output = Path(config.output)
    scoring = _scoring(config, overwrite)
    with lock(output) if rank() == 0 else nullcontext():
        if interrupt is None:
            score(scoring)
        else:
            score(scoring, lambda: interrupt.reason if interrupt.requested() else None)
            interrupt.close()
        together = options.together(config.cluster)
        if rank() and not together:
            return None
        job = jobs.prepare(scoring)
        manifest = jobs.read_json(job.folder / "manifest.json")
        settings = {"version": VERSION, "scores": _hash(manifest["settings"]), **dataclasses.asdict(config.cluster)}
        stamp = jobs.read_json(output / "clusters.json")
        if stamp.get("settings") == settings and (output / "clusters.npy").exists():
            console.print("clusters: made before from the same scores and options")
        else:
            stamp = {"settings": settings, "facts": _cluster(config, job, output, together)}
        if rank():
            return None
        write_atomically(output / "clusters.json", dump(stamp))
        return _pick(config, job, output, stamp)


def _scoring(config: SelectionConfig, overwrite: bool):
    """Options of the scoring run: the quality score, router features, and further configured scores."""
    wanted = {config.select.quality, *config.score.metric}
    if config.cluster.method != "none":
        wanted.add("router")
    fixed = {"out": str(Path(config.output) / "scores.jsonl"), "metric": sorted(wanted), "only_idx": True}
    return dataclasses.replace(config.score, **fixed, report=False, overwrite=overwrite)


def _cluster(config: SelectionConfig, job: Job, output: Path, together: bool) -> dict:
    """Write clusters.npy; returns facts about the clusters."""
    count = pq.read_metadata(job.folder / "rows.parquet").num_rows
    if config.cluster.method == "none":
        features, usable = None, np.arange(count)
    else:
        features = _features(job, None)
        features = features.subset(np.flatnonzero(features.usable()))
        usable = features.rows
    if not len(usable):
        raise UserError(f"{job.out}: no row has router features; {job.folder / 'statistics.json'} says why")
    if features is None:
        found = Clustering(np.zeros(len(usable), np.int32), {"method": "none"})
    else:
        with joined() if together else nullcontext():
            found = cluster(features, config.cluster)
    if rank() == 0:
        labels = np.full(count, UNUSABLE, np.int32)
        labels[usable] = found.labels
        with open(beside(output / "clusters.npy", ".tmp"), "wb") as file:
            np.save(file, labels)
        os.replace(beside(output / "clusters.npy", ".tmp"), output / "clusters.npy")
        console.print(f"{len(usable):,} rows in {found.count:,} clusters")
    return found.facts


def _pick(config: SelectionConfig, job: Job, output: Path, stamp: dict) -> dict:
    """Pick rows and write them, the table and the page, unless they exist for the same clusters and options."""
    settings = {"clusters": _hash(stamp), **dataclasses.asdict(config.select)}
    out = output / "selected_data.jsonl"
    before = jobs.read_json(output / "report.json")
    if before.get("settings") == settings and out.exists() and out.stat().st_size == before["bytes"]:
        console.print(f"{out}: finished before from the same scores, clusters and options")
        return before
    labels = np.load(output / "clusters.npy")
    quality = _column(job, config.select.quality)
    better = quality if config.select.best == "highest" else -quality
    labels[~np.isfinite(quality)] = UNUSABLE  # here, since the clusters serve any score
    usable = np.flatnonzero(labels != UNUSABLE)
    candidates = np.flatnonzero(labels >= 0)
    count = int(len(usable) * config.select.percentage)
    if not count:
        share = f"{config.select.percentage:g} of {len(usable):,} rows"
        raise UserError(f"select.percentage: {share} is not one row; give more data or a larger share")
    count = min(count, len(candidates))  # fewer than asked for where noise was dropped
    chosen = candidates[_choose(config, job, better[candidates], labels, candidates, count)]
    drawn = usable[pick.random(len(usable), len(chosen), config.select.seed)]
    picked = np.zeros(len(labels), bool)
    picked[chosen] = True
    examples = report.examples(labels, better, chosen)
    by_chance = np.zeros(len(labels), bool)
    by_chance[drawn] = True
    targets = {out: picked, output / "random_data.jsonl": by_chance}
    lines = _write_rows(job, targets, {row for _, rows in examples for row in rows})
    order = np.full(len(labels), -1)
    order[chosen] = np.arange(len(chosen))
    table = {
        "idx": np.arange(len(labels)),
        "quality": pa.array(quality, from_pandas=True),
        "cluster": pa.array(labels, mask=labels == UNUSABLE),
        "picked": picked,
        "order": pa.array(order, mask=~picked),
    }
    pq.write_table(pa.table(table), beside(output / "rows.parquet", ".tmp"))
    os.replace(beside(output / "rows.parquet", ".tmp"), output / "rows.parquet")
    result = {
        "settings": settings,
        "bytes": out.stat().st_size,
        **report.figures(labels, quality, picked, drawn),
        "unusable": _unusable(job, labels),
        "clustering": stamp["facts"],
    }
    features = None if config.cluster.method == "none" else _features(job, usable)
    report.write(output / "report.html", result, report.Rows(labels, quality, picked, drawn, features), examples, lines)
    write_atomically(output / "report.json", dump(result))
    report.show(out, result)
    return result


def _choose(
    config: SelectionConfig, job: Job, quality: np.ndarray, labels: np.ndarray, candidates: np.ndarray, count: int
) -> np.ndarray:
    """Picked positions within `candidates`. quality: of the candidates. labels: of all rows."""
    how, labels = config.select.pick, labels[candidates]
    if how == "round_robin":
        return pick.round_robin(quality, labels, count)
    if how == "stratified":
        return pick.stratified(quality, labels, count)
    if how == "top_k":
        return pick.top_k(quality, count)
    if how == "random":
        return pick.random(len(quality), count, config.select.seed)
    return pick.farthest(quality, _features(job, candidates), count)


def _write_rows(job: Job, targets: dict[Path, np.ndarray], shown: set[int]) -> dict[int, bytes]:
    """Write to each target the rows that it marks, bool [rows]; returns the lines of those in `shown`."""
    lines, number = {}, 0
    count = len(next(iter(targets.values())))
    with ExitStack() as stack, progress("writing rows", count, "rows") as task:
        files = [(stack.enter_context(open(beside(p, ".tmp"), "wb")), wanted) for p, wanted in targets.items()]
        for number, line in enumerate(input_lines(job.sources), 1):
            if number > count:
                break
            for file, wanted in files:
                if wanted[number - 1]:
                    file.write(line + b"\n")
            if number - 1 in shown:
                lines[number - 1] = line
            if number % STEP_ROWS == 0:
                task.advance(STEP_ROWS)
    if number != count:
        raise UserError("the data was changed since it was scored; run the same command with --overwrite")
    for path in targets:
        os.replace(beside(path, ".tmp"), path)
    return lines


def _column(job: Job, name: str) -> np.ndarray:
    """A score of all rows, float64, NaN where there is none."""
    found = pq.read_table(job.folder / "rows.parquet", columns=[name])[name]
    return found.to_numpy(zero_copy_only=False).astype(np.float64)


def _features(job: Job, rows: np.ndarray | None) -> Features:
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return Features(job.files["router"], rows, device)


def _unusable(job: Job, labels: np.ndarray) -> dict[str, int]:
    """Number of rows that cannot be picked, per reason."""
    errors = pq.read_table(job.folder / "rows.parquet", columns=["error"])["error"].to_pylist()
    bad = np.flatnonzero(labels == UNUSABLE)
    return dict(Counter((errors[i] or "no score").partition(" (")[0] for i in bad.tolist()))


def _hash(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
