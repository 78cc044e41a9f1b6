"""Options of a selection: `SelectionConfig`, read like a run's configuration from YAML and `key=value`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

from ds_llm.config import options
from ds_llm.config.options import key
from ds_llm.distributed.environment import world_size
from ds_llm.errors import ConfigError
from ds_llm.scoring.options import ScoreConfig

# implementations of each method, the one that auto takes first
BACKENDS = {
    "kmeans": ("torch", "sklearn", "cuml"),
    "minibatch": ("sklearn",),
    "hdbscan": ("cuml", "sklearn"),
    "gmm": ("sklearn",),
    "spectral": ("sklearn",),
    "none": ("torch",),
}
PICKS = ("round_robin", "stratified", "top_k", "random", "farthest")
OWN = ("out", "field", "only_idx", "report", "overwrite")  # options of scoring that the selection sets itself


@dataclass
class ClusterConfig:
    method: str = key("kmeans", "How rows are clustered; none: all rows are one cluster", choices=tuple(BACKENDS))
    backend: str = key(
        "auto", "Library that does it; auto: see docs/selection.md", choices=("auto", "torch", "sklearn", "cuml")
    )
    k: int | None = key(None, "Number of clusters; none: chosen from k_range", at_least=1)
    k_range: list[int] = key([10, 100], "Smallest and largest number of clusters to choose from")
    max_iters: int = key(300, "Passes over the rows at most", at_least=1)
    min_cluster_size: int | None = key(None, "hdbscan: rows of a cluster at least; none: tuned", at_least=2)
    min_samples: int | None = key(
        None, "hdbscan: neighbours that make a place dense; none: min_cluster_size", at_least=1
    )
    noise: str = key(
        "nearest",
        "hdbscan: rows in no cluster go to the nearest one, are one of their own, or are dropped",
        choices=("nearest", "own", "drop"),
    )
    seed: int = key(0, "Seed of samples and first centroids", at_least=0)


@dataclass
class PickConfig:
    percentage: float = key(0.05, "Share of the usable rows to take", above=0, at_most=1)
    pick: str = key("round_robin", "Which rows of the clusters are taken", choices=PICKS)
    quality: str = key("quality", "Score by which rows are good: quality (of gates), entropy, logprob, perplexity, ...")
    best: str = key("highest", "Which values of that score are good", choices=("highest", "lowest"))
    seed: int = key(0, "Seed of random picks, also of the one that the report compares with", at_least=0)


@dataclass
class SelectionConfig:
    output: str = key("runs/select", "Folder of the selection")
    score: ScoreConfig = field(default_factory=lambda: ScoreConfig(metric=[]))
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    select: PickConfig = field(default_factory=PickConfig)


def load(path: str | None = None, overrides: list[str] = ()) -> SelectionConfig:
    """Defaults, a YAML file and `key=value` overrides; see `ds_llm.config.options.load` for what is refused, and
    `check`."""
    found = options.load(SelectionConfig, path, overrides)
    check(found)
    return found


def check(config: SelectionConfig) -> None:
    """Raise `ConfigError` for missing options and impossible combinations. Opens no file."""
    default = ScoreConfig()
    for name in OWN:
        if getattr(config.score, name) != getattr(default, name):
            raise ConfigError(f"score.{name}: is the selection's to set (output names its folder)")
    for name in ("model", "data"):
        if not getattr(config.score, name):
            raise ConfigError(f"score.{name}: not given")
    if config.cluster.method == "none" and config.select.pick == "farthest":
        raise ConfigError("select.pick: farthest needs features; choose another cluster.method than none")
    _check_cluster(config.cluster)


def _check_cluster(config: ClusterConfig) -> None:
    low, high = [*config.k_range, 0, 0][:2]
    if len(config.k_range) != 2 or not 2 <= low < high:
        raise ConfigError(f"cluster.k_range: {config.k_range} must be two numbers of at least 2, the smaller first")
    known = BACKENDS[config.method]
    if config.backend not in ("auto", *known):
        raise ConfigError(f"cluster.backend: {config.method} has no {config.backend}; it has {', '.join(known)}")
    backend(config)


def backend(config: ClusterConfig) -> str:
    """The library for the configured method on this machine. Raises `ConfigError` where it cannot be used."""
    usable = {"torch": True, "sklearn": True, "cuml": "cuml" in BACKENDS[config.method] and _has_cuml()}
    if config.backend == "auto":
        return next(name for name in BACKENDS[config.method] if usable[name])
    if not usable[config.backend]:
        raise ConfigError(f"cluster.backend: {config.backend} needs a GPU, cuml and cupy; not all of them are here")
    return config.backend


def together(config: ClusterConfig) -> bool:
    """Whether all processes of the job cluster together; otherwise rank 0 does, alone."""
    return config.method == "kmeans" and backend(config) == "torch" and world_size() > 1


def _has_cuml() -> bool:
    if not all(importlib.util.find_spec(name) for name in ("cuml", "cupy")):
        return False
    import torch

    return torch.cuda.is_available()
