"""How long do clustering and picking take, and how much memory, beside scikit-learn's K-means on the same features?

Features are made up: rows of a few hundred topics, each with its own preferences of experts, with noise; probabilities
[rows, layers, experts] in half precision, in a file. Each contestant runs in a process of its own and reads that file.

selection    what `launch/select_data.py` does between scores and rows: usable rows, k by the elbow, K-means, picks;
             and of it the K-means alone
sklearn      `sklearn.cluster.KMeans` with the same k, on the same rows and from the same first centroids

Inertia is the sum over the rows of 1 - cosine to the direction of their cluster's mean. Peak memory counts the mapped
pages of the feature file in. CPU seconds, of all threads, are what other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

TOPICS, SPREAD, NOISE = 200, 1.0, 1.0  # how many, how far their logits lie apart, and the rows of one
CHUNK = 4096


def make_features(path: Path, rows: int, layers: int, experts: int, seed: int) -> None:
    """Write features float16 [rows, layers, experts]."""
    from ds_llm.progress import progress

    random = np.random.default_rng(seed)
    centres = random.normal(scale=SPREAD, size=(TOPICS, layers, experts)).astype(np.float32)
    frequent = random.dirichlet(np.ones(TOPICS))
    table = np.lib.format.open_memmap(path, "w+", np.float16, (rows, layers, experts))
    with progress("making features", rows, "rows") as task:
        for start in range(0, rows, CHUNK):
            topics = random.choice(TOPICS, min(CHUNK, rows - start), p=frequent)
            logits = random.standard_normal((len(topics), layers, experts), np.float32) * NOISE + centres[topics]
            shares = np.exp(logits)
            table[start : start + len(topics)] = shares / shares.sum(-1, keepdims=True)
            task.advance(len(topics))
    table.flush()


class Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self):
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict:
        return {"seconds": time.perf_counter() - self._wall, "cpu_seconds": time.process_time() - self._cpu}


def selection(path: Path, options: dict) -> dict[str, dict]:
    from ds_llm.selection import methods, pick
    from ds_llm.selection.clustering import cluster
    from ds_llm.selection.features import Features
    from ds_llm.selection.options import ClusterConfig

    whole = Clock()
    features = Features(path)
    features = features.subset(np.flatnonzero(features.usable()))
    config = ClusterConfig(seed=options["seed"])
    config.k = options["k"] or methods.elbow(features, config, {})
    alone = Clock()
    found = cluster(features, config)
    kmeans = alone.read() | {"passes": found.facts["passes"], "labels": found.labels}
    quality = np.random.default_rng(options["seed"]).random(len(features))
    chosen = pick.round_robin(quality, found.labels, int(len(features) * 0.05))
    return {"selection": whole.read() | {"k": config.k, "picked": len(chosen)}, "k-means": kmeans}


def sklearn(path: Path, options: dict) -> dict[str, dict]:
    from sklearn.cluster import KMeans

    from ds_llm.selection.features import Features
    from ds_llm.selection.spherical import seeds

    clock = Clock()
    features = Features(path)
    model = KMeans(options["k"], init=seeds(features, options["k"], options["seed"]).numpy(), n_init=1)
    labels = model.fit_predict(features.all().numpy())
    return {"sklearn": clock.read() | {"passes": model.n_iter_, "labels": labels}}


def measured(run: Callable, path: Path, options: dict, threads: int) -> dict[str, dict]:
    """What `run` returns, with the peak memory of its process."""
    import torch

    from ds_llm import cli

    cli.quiet()
    torch.set_num_threads(threads)
    found = run(path, options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {name: entry | {"peak_gb": peak} for name, entry in found.items()}


def inertia(path: Path, labels: np.ndarray) -> float:
    """Sum over the rows of 1 - cosine to the direction of the mean of their cluster, labels int [rows]."""
    import torch

    from ds_llm.selection.features import Features

    features = Features(path)
    owners = torch.from_numpy(labels.astype(np.int64))
    sums = torch.zeros(int(labels.max()) + 1, features.width, dtype=torch.float64)
    for part, rows in features.parts(range(features.blocks)):
        sums.index_add_(0, owners[part], rows.double())
    directions = torch.nn.functional.normalize(sums, dim=1)
    total = 0.0
    for part, rows in features.parts(range(features.blocks)):
        total += float((1 - (rows.double() * directions[owners[part]]).sum(1)).sum())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--k", type=int, help="clusters (default: by the elbow, from 10 to 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: all cores)")
    parser.add_argument("--features", type=Path, metavar="PATH", help="file of features to use, made where it is not")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes to come

    from benchmarks.machine import record, versions

    about = record()
    about["versions"] = versions(("torch", "numpy", "scikit-learn"))
    about |= {name: getattr(args, name) for name in ("rows", "layers", "experts", "seed", "threads")}
    context = multiprocessing.get_context("spawn")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = args.features or Path(folder) / "router.npy"
        if not path.exists():
            make_features(path, args.rows, args.layers, args.experts, args.seed)
        options = {"k": args.k, "seed": args.seed}
        for run in (selection, sklearn):
            with ProcessPoolExecutor(1, context) as pool:
                found |= pool.submit(measured, run, path, options, args.threads).result()
            options["k"] = found["selection"]["k"]
        for name in ("k-means", "sklearn"):
            found[name]["inertia"] = inertia(path, found[name].pop("labels"))
    about |= {"k": options["k"], "contestants": found}
    machine = about["machine"]
    shape = f"{args.rows:,} rows x {args.layers} x {args.experts}"
    print(f"{shape}, k={options['k']}, {machine['cpu']}, {args.threads} threads")
    print(" " * 10 + "".join(f"{head:>10}" for head in ("seconds", "CPU s", "peak GB", "passes", "inertia")))
    for name, e in found.items():
        end = f"{e['passes']:10}{e['inertia']:10.1f}" if "inertia" in e else ""
        print(f"{name:10}{e['seconds']:10.1f}{e['cpu_seconds']:10.1f}{e['peak_gb']:10.2f}{end}")
    difference = found["k-means"]["inertia"] / found["sklearn"]["inertia"] - 1
    print(f"inertia of k-means over scikit-learn's: {difference:+.3%}")
    if args.json:
        args.json.write_text(json.dumps(about, indent=2) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
