"""Do quality gates pick clean text out of a mixed pool, and is a model trained on the pick better for it?

    python -m benchmarks.selection_quality --work /tmp/selection --json selection.json

A small mixture-of-experts decoder is pretrained on Wikipedia passages and given quality gates. These are trained with
each quality loss (launch/train.py mode=router), once on a part of the pretraining text, which is known to be good, and
on a part of each pool (`benchmarks.mixed_pool`, one for each seed). Rows are picked (launch/select_data.py) by
round-robin over clusters of router features and by quality alone, and compared with picks at random and by entropy and
perplexity under the pretrained model.

Judged by: the area under the ROC curve of the score as a detector of clean rows (0.5: blind; the labels are used for
nothing else), the share of clean rows among those picked, and the loss on held-out clean text of the pretrained model
after equally many further steps on each pick. Everything is kept in --work; the same command continues.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import runpy
import statistics
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import mixed_pool
from ds_llm import cli
from ds_llm.selection import pick

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
PRELOADED = ("ds_llm.train.trainer", "ds_llm.selection.run", "ds_llm.convert.select_moe", "peft", "torch._dynamo")
ORIGINAL = ("sigmoid", "mse", "beta_moment_matching", "mean_variance_regularization")
PAIRS = ("contrastive", "ranking")
LOSS_AWARE = "loss_aware"
GATES = {  # quality loss, its weight, and what the gates are trained on
    "untrained": None,
    "LM loss alone": ("sigmoid", 0.0, "pool"),
    **{loss: (loss, 1.0, "trusted") for loss in (*ORIGINAL, *PAIRS)},
    **{f"{loss}, weight 30": (loss, 30.0, "trusted") for loss in PAIRS},
    **{f"{loss}, on the pool": (loss, 1.0, "pool") for loss in (*ORIGINAL, *PAIRS, LOSS_AWARE)},
    LOSS_AWARE: (LOSS_AWARE, 1.0, "trusted"),
}
SHARES = (0.05, 0.1, 0.2)
JUDGED = 0.1  # share of the picks that are trained on and listed by kind
CLUSTERS = 16
CLEAN = ("clean", "news")
BASE = "mode=pretrain model.dim=128 model.n_layers=3 model.n_heads=4 model.n_kv_heads=2 model.max_seq_len=256 "
BASE += "model.use_moe=true model.n_routed_experts=4 model.moe_intermediate_size=128 optim.lr=4e-3 "
BASE += "optim.warmup_ratio=0.05 train.epochs=2"
WARMUP = "mode=router optim.lr=1e-2 optim.weight_decay=0 router.held_out=0"
SUBSET = {"trusted": 0.3, "pool": 1.0}  # share of the texts that gates are trained on
FURTHER = "mode=pretrain optim.lr=5e-4 optim.schedule=constant optim.warmup_steps=5 eval.max_windows=32"
COMMON = "train.dtype=fp32 train.batch_size=8 zero=0 checkpoint.every_steps=0 checkpoint.every_epoch=false "
COMMON += "checkpoint.best=false tracking.tensorboard=false tracking.report=false eval.before=false"


@dataclass
class Picks:
    """rows: `{"text", "kind"}`. clean: bool [rows]. scores: name -> [rows], more is better. orders: name -> numbers of
    the rows, the first choice first."""

    folder: Path
    rows: list[dict]
    clean: np.ndarray
    scores: dict[str, np.ndarray]
    orders: dict[str, np.ndarray]


class Bench:
    """The experiment in a folder; every step is left out where its result is there."""

    def __init__(self, work: Path, rows: int, gate_steps: int, steps: int):
        self.work, self.rows, self.gate_steps, self.steps = work.resolve(), rows, gate_steps, steps
        self.work.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, *arguments: str) -> None:
        """A launch script, in a process that has the libraries already; ends with its last words where it fails."""
        log = self.work / "log.txt"
        for module in PRELOADED:
            importlib.import_module(module)
        process = multiprocessing.get_context("fork").Process(target=run_script, args=(name, arguments, log))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"error: {name}.py {' '.join(arguments)}: {log.read_text()[-2000:]}")

    def train(self, out: Path, *overrides: str) -> float:
        """Train into a folder unless it was; the loss of its last evaluation in nats per token, nan without one."""
        if not finished(out):
            self.run("train", f"output={out}", *COMMON.split(), *overrides)
        found = [row for row in records(out) if row["kind"] == "eval"]
        return found[-1]["loss"] if found else float("nan")

    def tokens(self, texts: Path) -> Path:
        from ds_llm.data.encode import encode

        out = texts.with_suffix(".bin")
        encode([texts], out, self.work / "tokenizer", workers=1, overwrite=True)
        return out

    def pretrain(self) -> float:
        """The models `base` and, with gates, `select`; returns the base's held-out loss."""
        texts = mixed_pool.write_texts(self.work)
        if not (self.work / "tokenizer" / "tokenizer.json").exists():
            self.run("prepare", "tokenizer", str(texts["pretrain"]), "--out", str(self.work / "tokenizer"),
                     "--vocab-size", "4096")  # fmt: skip
        data = [f"data.train=[{self.tokens(texts['pretrain'])}]", f"data.val=[{self.tokens(texts['held_out'])}]"]
        loss = self.train(self.work / "base", *BASE.split(), *data)
        if not (self.work / "select" / "config.json").exists():
            self.run("convert", "select-moe", "--model", str(self.work / "base"), "--out", str(self.work / "select"))
        return loss

    def picks(self, seed: int, gates: list[str]) -> Picks:
        """The pool of a seed, every row's score under each method, and all rows in the order they are picked in."""
        folder = self.work / f"seed-{seed}"
        rows = mixed_pool.pool(self.rows, seed)
        pool = mixed_pool.write(folder / "pool.jsonl", rows)
        entropy, perplexity = self.base_scores(folder, pool)
        scores = {
            "entropy, lowest": -entropy,
            "entropy, highest": entropy,
            "perplexity, lowest": -perplexity,
            "perplexity, highest": perplexity,
            "perplexity, middle": -np.abs(np.argsort(np.argsort(perplexity)) - len(rows) / 2),
        }
        orders = {"random": pick.random(len(rows), len(rows), seed)}
        orders |= {name: pick.by_quality(score) for name, score in scores.items()}
        for name in gates:
            quality, clusters = self.gates(folder, pool, name, seed)
            scores[f"gates: {name}"] = quality
            orders[f"gates: {name}"] = pick.by_quality(quality)
            orders[f"gates: {name}, clusters"] = pick.round_robin(quality, clusters, len(rows))
        clean = np.isin([row["kind"] for row in rows], CLEAN)
        drawn = pick.random(len(rows), len(rows), seed + 1000)
        orders["clean only"] = drawn[clean[drawn]]
        return Picks(folder, rows, clean, scores, orders)

    def judge(self, found: Picks) -> dict[str, dict]:
        """What the picks are worth; trains on each of them."""
        kinds = np.array([row["kind"] for row in found.rows])
        counts = {share: int(share * len(kinds)) for share in SHARES}
        judged = {}
        for name, order in found.orders.items():
            score, taken = found.scores.get(name), order[: counts[JUDGED]]
            judged[name] = {
                "auc": None if score is None else auc(score, found.clean),
                "auc_by_kind": None if score is None else by_kind(score, found.clean, kinds),
                "clean": {share: float(found.clean[order[:count]].mean()) for share, count in counts.items()},
                "kinds": dict(Counter(kinds[taken].tolist())),
                "loss": None,
            }
            if self.steps:
                folder = re.sub(r"\W+", "-", name) + (f"-{self.gate_steps}" if name.startswith("gates") else "")
                judged[name]["loss"] = self.further(found.folder / folder, found.rows, taken)
            show(found.folder.name, name, judged[name])
        return judged

    def base_scores(self, folder: Path, pool: Path) -> tuple[np.ndarray, np.ndarray]:
        """Entropy and perplexity of every row under the pretrained model."""
        out = folder / "scores.jsonl"
        self.run("score", "--model", str(self.work / "base"), "--data", str(pool), "--metric", "entropy", "perplexity",
                 "--out", str(out), "--only-idx", "score.report=false")  # fmt: skip
        found = [json.loads(line) for line in out.open()]
        return tuple(np.array([row[name] for row in found], float) for name in ("entropy", "perplexity"))

    def gates(self, folder: Path, pool: Path, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Quality and cluster of every row by gates that were trained as `GATES` says."""
        import pyarrow.parquet

        plain = re.sub(r"\W+", "-", name)
        model, selected = self.work / "select", folder / f"select-{plain}-{self.gate_steps}"
        if GATES[name]:
            loss, weight, texts = GATES[name]
            trained = (folder if texts == "pool" else self.work) / f"gates-{plain}-{self.gate_steps}"
            data = pool if texts == "pool" else self.work / "pretrain.jsonl"
            seed = seed if texts == "pool" else 0
            keys = [f"train.max_steps={self.gate_steps}", f"train.seed={seed}", f"data.train=[{data}]"]
            keys += [f"data.subset_ratio={SUBSET[texts]}"]
            keys += [f"router.quality_loss={loss}", f"router.quality_weight={weight}", f"model.path={model}"]
            self.train(trained, *WARMUP.split(), *keys)
            model = trained
        self.run("select_data", f"score.model={model}", f"score.data=[{pool}]", f"output={selected}",
                 f"cluster.k={CLUSTERS}", f"cluster.seed={seed}", f"select.percentage={JUDGED}")  # fmt: skip
        table = pyarrow.parquet.read_table(selected / "rows.parquet")
        return table["quality"].to_numpy().astype(float), table["cluster"].to_numpy()

    def further(self, folder: Path, rows: list[dict], taken: np.ndarray) -> float:
        """Held-out loss of the pretrained model after `steps` more on the rows taken."""
        # often enough that no epoch ends, with an evaluation, before the last step
        texts = [{"text": rows[i]["text"]} for i in taken] * self.steps
        texts = mixed_pool.write(folder / "pick.jsonl", texts)
        data = [f"data.train=[{self.tokens(texts)}]", f"data.val=[{self.work / 'held_out.bin'}]"]
        keys = [f"train.max_steps={self.steps}", "checkpoint.last=false", f"model.path={self.work / 'base'}", *data]
        return self.train(folder / "run", *FURTHER.split(), *keys)


def auc(score: np.ndarray, clean: np.ndarray, among: np.ndarray | slice = slice(None)) -> float:
    """Area under the ROC curve of a score [rows] as a detector of clean rows."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(clean[among], score[among]))


def by_kind(score: np.ndarray, clean: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """That area for the clean rows against those of each kind."""
    return {kind: auc(score, clean, clean | (kinds == kind)) for kind in mixed_pool.KINDS}


def run_script(name: str, arguments: tuple[str, ...], log: Path) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [str(LAUNCH / f"{name}.py"), *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def records(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.open()] if path.exists() else []


def finished(run: Path) -> bool:
    return any(row["kind"] == "summary" for row in records(run))


def show(seed: str, name: str, row: dict) -> None:
    auc = "" if row["auc"] is None else f"  AUC {row['auc']:.3f}"
    shares = "  ".join(f"{value:.1%}" for value in row["clean"].values())
    loss = "" if row["loss"] is None else f"  loss {row['loss']:.4f}"
    print(f"{seed}  {name:45} clean {shares}{auc}{loss}", flush=True)


def table(seeds: dict[int, dict]) -> list[str]:
    """Means and standard deviations over the seeds, as the rows of a Markdown table."""

    def cell(values: list[float], digits: int, percent: bool = False) -> str:
        values = [100 * v for v in values] if percent else values
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    shares = " | ".join(f"clean % of {share:.0%}" for share in SHARES)
    lines = [f"| pick | AUC | {shares} | held-out loss |", "| --- |" + " --- |" * (len(SHARES) + 2)]
    for name in next(iter(seeds.values())):
        rows = [found[name] for found in seeds.values()]
        cells = ["" if rows[0]["auc"] is None else cell([row["auc"] for row in rows], 3)]
        cells += [cell([row["clean"][share] for row in rows], 1, percent=True) for share in SHARES]
        cells += ["" if rows[0]["loss"] is None else cell([row["loss"] for row in rows], 4)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def kinds_table(seeds: dict[int, dict]) -> list[str]:
    """The area under the curve of clean rows against those of one kind, means over the seeds, in Markdown."""
    lines = [f"| score | {' | '.join(mixed_pool.KINDS)} |", "| --- |" + " --- |" * len(mixed_pool.KINDS)]
    for name, row in next(iter(seeds.values())).items():
        if row["auc_by_kind"]:
            means = [statistics.mean(found[name]["auc_by_kind"][kind] for found in seeds.values())
                     for kind in mixed_pool.KINDS]  # fmt: skip
            lines.append(f"| {name} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection_quality", description=__doc__.split("\n")[0])
    parser.add_argument("--work", required=True, type=Path, metavar="FOLDER", help="where everything is kept")
    parser.add_argument("--rows", type=int, default=800, help="rows of a pool (default 800)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES), metavar="NAME",
                        help=f"how gates are trained (all of {', '.join(GATES)})")  # fmt: skip
    parser.add_argument("--gate-steps", type=int, default=100, help="steps of gate training (default 100)")
    parser.add_argument("--steps", type=int, default=12, help="further steps on each pick, 0: none (default 12)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

    from benchmarks.machine import record

    about, began = record(), time.time()
    bench = Bench(args.work, args.rows, args.gate_steps, args.steps)
    before = bench.pretrain()
    print(f"pretrained: held-out loss {before:.4f}", flush=True)
    asked = {name: value for name, value in vars(args).items() if name not in ("json", "work")}
    found = {seed: bench.picks(seed, args.gates) for seed in args.seeds}
    seeds = {seed: bench.judge(picks) for seed, picks in found.items()}
    print("\n".join([*table(seeds), "", *kinds_table(seeds)]))
    if args.json:
        result = {"arguments": asked, "held_out_loss_before": before, "seconds": time.time() - began, "seeds": seeds}
        args.json.write_text(json.dumps(about | result, indent=2) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    cli.run(main)
