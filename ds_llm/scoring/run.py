"""Scores a data set by a model, on any number of ranks, and continues after a kill at any point.

OUT.d/
    manifest.json     what the scores depend on, every attempt with versions and commit, and whether it is finished
    index/            the rows as tokens (see `index`), until the output is there
    parts/            the scores, a file for each rank and attempt (see `parts`), until the output is there
    rows.parquet      idx, length, truncated, tokens (that count), all scores and error of each row
    tokens.parquet    idx, positions and values of the tokens that count, with per_token
    router.npy        arrays, float16 [rows, ...] in the order of the input, NaN in rows without scores
    statistics.json   counts, distributions and speed
    report.html       the same as a page, with figures and the rows at both ends
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ds_llm import hardware
from ds_llm.data.resumable import dump, write_atomically
from ds_llm.data.sources import digests
from ds_llm.distributed import watchdog
from ds_llm.distributed.environment import rank, world_size
from ds_llm.errors import UserError
from ds_llm.progress import Task, console, progress
from ds_llm.scoring import batches as plan
from ds_llm.scoring import manifest as jobs
from ds_llm.scoring import options, parts, statistics
from ds_llm.scoring.coordination import Elsewhere, Ranks, RemotePart
from ds_llm.scoring.forward import Scorer
from ds_llm.scoring.index import Index, build
from ds_llm.scoring.manifest import Job
from ds_llm.scoring.merge import Output, merge
from ds_llm.scoring.options import ScoreConfig
from ds_llm.scoring.parts import Part
from ds_llm.scoring.report import write_report
from ds_llm.scoring.worker import Worker, schema, tokens_that_fit

SHOW_SECONDS = 1.0


def compute_entropy_for_model(
    model_path: str | os.PathLike,
    data_files: str | os.PathLike | Sequence[str | os.PathLike],
    output_path: str | os.PathLike,
    entropy_field: str = "entropy",
    **more,
) -> dict:
    """Entropy in nats of every row's answer under a model, as the field `entropy_field` of the rows in `output_path`.

    more: other keys of `ScoreConfig`, such as max_length=2048. Returns what `score` does; in a job of several
    processes every one of them calls it.
    """
    names = [data_files] if isinstance(data_files, (str, os.PathLike)) else data_files
    flags = {"model": str(model_path), "data": [str(name) for name in names], "out": str(output_path)}
    return score(options.load(flags={**flags, "metric": ["entropy"], "field": [entropy_field], **more}))


def score(config: ScoreConfig, stop: Callable[[], str | None] = lambda: None) -> dict:
    """Score every row of the data; each rank of a job calls it. Returns the statistics when the output is written.

    stop: returns the reason why this process should stop, or None. After any end the same call continues the run, on
    any number of ranks, to the same bytes; a finished run stays as it is. Raises `UserError` where the output or its
    folder belong to another run, where no row can be scored, and where a rank fails.
    """
    options.check(config)
    if config.zero3:
        from ds_llm.engine import startup  # DeepSpeed takes seconds to import

        startup.check_dtype(config.dtype, f"score.dtype={config.dtype}")
    with watchdog.guard(config.hang_timeout, config.lost_timeout, "score") as peers:
        job = jobs.prepare(config)
        with jobs.lock(job):
            return _run(job, Ranks(peers, job.folder, stop))


def _run(job: Job, ranks: Ranks) -> dict:
    with contextlib.closing(ranks):
        try:
            return _lead(job, ranks) if rank() == 0 else _follow(job, ranks)
        except Elsewhere:
            raise
        except UserError as error:
            error.any_rank = True
            raise
        except OSError as error:
            where = f"{error.filename or job.folder}: {error.strerror or error}"
            raise UserError(f"{where}; what was done is kept, the same command continues", any_rank=True) from None


def _lead(job: Job, ranks: Ranks) -> dict:
    """Rank 0: the index, the plan, its own share, and in the end the merge."""
    began = time.monotonic()
    data = digests(job.sources, job.folder)
    manifest = jobs.open_manifest(job, data)
    if manifest.get("finished") and jobs.same_files(job, manifest):
        return _finish(job, ranks, "finished before from the same model, data and options; nothing to do")
    index_folder = job.folder / "index"
    index = build(index_folder, job.index_key(data), job.sources, job.formats, job.encoder_arguments(), ranks.check)
    statistics.describe_rows(index)
    indexed = time.monotonic()
    ranks.announce("indexed")
    watchdog.doing("loading the model")
    with _scorer(job) as scorer:
        manifest = jobs.check_weights(job, manifest, scorer.fingerprint)
        if manifest.get("finished"):
            return _finish(job, ranks, "finished before from the same model, data and options; nothing to do")
        settings = {**job.settings, "data": data, "model": scorer.fingerprint}
        settings["tokens_per_batch"] = _budget(job, manifest, scorer, index)
        attempts = [*manifest.get("attempts", []), {"ranks": world_size(), **hardware.environment()}]
        manifest = {"settings": settings, "attempts": attempts, "options": vars(job.config)}
        write_atomically(job.folder / "manifest.json", dump(manifest))
        batches = plan.make(index, settings["tokens_per_batch"])
        missing = _missing(job, batches, settings)
        worker = Worker(scorer, index, batches, missing)
        _describe(batches, worker, settings["tokens_per_batch"])
        ranks.receive(lambda number: Part(_part_path(job, len(attempts), number), settings))
        files = ["missing.npy", *(f"index/{path.name}" for path in sorted(index_folder.iterdir()) if path.is_file())]
        ranks.announce("ready", settings=settings, attempt=len(attempts), files=files)
        ready = time.monotonic()
        title = "scoring (continued)" if len(missing) < len(batches) else "scoring"
        with progress(title, int(batches.tokens[missing].sum()), "tokens") as task:
            show = _Display(task, ranks)
            _work(job, worker, ranks, settings, len(attempts), show)
            ranks.wait_for_all(show)
        scored = time.monotonic()
        watchdog.doing("writing the output")
        output = _output(job, scorer)
    rows, tokens = ranks.totals()
    errors = merge(output, index, batches, settings, job.sources, ranks.check)
    merged = time.monotonic()
    speed = {
        "tokens_per_batch": settings["tokens_per_batch"],
        "ranks": world_size(),
        "attempts": len(attempts),
        "seconds": {"indexing": indexed - began, "scoring": scored - ready, "merging": merged - scored},
        "rows_per_second": rows / (scored - ready),
        "tokens_per_second": tokens / (scored - ready),
    }
    result = statistics.collect(output, index, batches, errors, speed)
    write_atomically(job.folder / "statistics.json", dump(result))
    fields = [name for name, column in result["columns"].items() if column["count"]]
    if job.config.report and fields:
        write_report(job.out, fields, job.folder / "report.html")
    write_atomically(job.folder / "manifest.json", dump(jobs.finish(job, manifest)))
    return _finish(job, ranks, f"{result['rows']:,} rows, {sum(errors.values()):,} with an error")


def _follow(job: Job, ranks: Ranks) -> dict:
    """The other ranks: their shares."""
    if ranks.wait_for("indexed")[0] != "finished":
        watchdog.doing("loading the model")
        with _scorer(job) as scorer:
            stage, told = ranks.wait_for("ready")
            if stage != "finished":
                settings = told["settings"]
                if scorer.fingerprint != settings["model"]:
                    raise UserError(f"{job.config.model}: rank {rank()} has other weights there than rank 0")
                folder = ranks.fetch(told["files"])
                index = Index(folder / "index")
                batches = plan.make(index, settings["tokens_per_batch"])
                missing = np.load(folder / "missing.npy")
                worker = Worker(scorer, index, batches, missing)
                _work(job, worker, ranks, settings, told["attempt"])
    _, told = ranks.wait_for("finished")
    ranks.forget()
    return told["statistics"]


def _part_path(job: Job, attempt: int, number: int) -> Path:
    return job.folder / "parts" / f"part-{attempt:04d}-{number:05d}.bin"


def _scorer(job: Job) -> Scorer:
    c = job.config
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    sharding = {"zero3": c.zero3, "offload": c.offload, "tensor_parallel": c.tensor_parallel}
    return Scorer(c.model, c.metric, dtype=job.settings["dtype"], per_token=c.per_token, **sharding)


def _budget(job: Job, manifest: dict, scorer: Scorer, index: Index) -> int:
    """Tokens of a batch: as earlier in this run, as configured, or as many as fit."""
    if manifest:
        return manifest["settings"]["tokens_per_batch"]
    if job.config.tokens_per_batch != "auto":
        return job.config.tokens_per_batch
    return tokens_that_fit(scorer, index)


def _missing(job: Job, batches: plan.Plan, settings: dict) -> np.ndarray:
    """Numbers of the batches that no part holds, also written down for the other ranks."""
    folder = job.folder / "parts"
    folder.mkdir(exist_ok=True)
    missing = np.ones(len(batches), bool)
    for batch, _ in parts.records(folder, settings):
        missing[batch] = False
    np.save(job.folder / "missing.npy", np.flatnonzero(missing))
    return np.flatnonzero(missing)


def _work(job: Job, worker: Worker, ranks: Ranks, settings: dict, attempt: int, show: Callable = lambda: None) -> None:
    part = Part(_part_path(job, attempt, rank()), settings) if ranks.shared else RemotePart(ranks.peers)
    try:
        worker.run(part, show=show, ranks=ranks)
    finally:
        part.close()
    ranks.progress["done"] = True
    if ranks.peers is not None:
        ranks.peers.poke()


def _describe(batches: plan.Plan, worker: Worker, budget: int) -> None:
    done = len(batches) - len(worker.missing)
    kept = f", {done:,} of them done before" if done else ""
    console.print(
        f"{len(batches):,} batches of up to {budget:,} tokens{kept}; padding {batches.padding:.2%}; "
        f"most loaded of {len(worker.shares)} ranks {worker.imbalance:+.2%} over the mean"
    )


class _Display:
    """Progress over all ranks; called between passes, looks at the others now and then."""

    def __init__(self, task: Task, ranks: Ranks):
        self.task, self.ranks, self._begin, self._shown, self._tokens = task, ranks, time.monotonic(), 0.0, 0

    def __call__(self) -> None:
        if time.monotonic() - self._shown < SHOW_SECONDS:
            return
        self._shown = time.monotonic()
        rows, tokens = self.ranks.totals()
        self.task.advance(tokens - self._tokens, f"{rows / (self._shown - self._begin):,.1f} rows/s")
        self._tokens = tokens


def _output(job: Job, scorer: Scorer) -> Output:
    lists = [name for name in scorer.columns if name not in ("tokens", *job.columns, *job.arrays)]
    return Output(job.out, job.folder, schema(scorer), job.fields, lists, job.files, job.config.only_idx)


def _finish(job: Job, ranks: Ranks, what: str) -> dict:
    """Remove the files of an unfinished run, and release the other ranks."""
    jobs.remove(job.folder, jobs.WORK)
    console.print(f"{job.out}: {what}")
    if (report := job.folder / "report.html").is_file():
        console.print(f"report: {report}")
    result = jobs.read_json(job.folder / "statistics.json")
    ranks.announce("finished", statistics=result)
    return result
