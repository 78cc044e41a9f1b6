"""Clusters of rows by the direction of their features, numbered by falling size."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from ds_llm.progress import console
from ds_llm.selection import methods
from ds_llm.selection.features import Features
from ds_llm.selection.methods import NOISE
from ds_llm.selection.options import ClusterConfig, backend

WHERE = {"nearest": "they go to the nearest", "own": "they are one of their own", "drop": "they are dropped"}
UNUSABLE = -2  # label of a row of the data that was not clustered: it has no features
METHODS = {
    "kmeans": methods.kmeans,
    "minibatch": methods.minibatch,
    "hdbscan": methods.hdbscan,
    "gmm": methods.gmm,
    "spectral": methods.spectral,
}


@dataclass
class Clustering:
    """Clusters of rows.

    labels: int32 [rows], clusters by falling size from 0, `NOISE` for dropped rows. facts: for the report; `curve` has
    `k`, `value`, `name` and `chosen` where the number of clusters was chosen.
    """

    labels: np.ndarray
    facts: dict = field(default_factory=dict)

    @property
    def count(self) -> int:
        return int(self.labels.max(initial=-1)) + 1


def cluster(features: Features, config: ClusterConfig) -> Clustering:
    """Cluster rows by the configured method. Raises `UserError` where HDBSCAN finds no cluster."""
    chosen = backend(config)
    facts: dict = {"method": config.method, "backend": chosen}
    labels = METHODS[config.method](features, config, chosen, facts)
    if (labels == NOISE).any():
        facts["noise"] = int((labels == NOISE).sum())
        console.print(f"{facts['noise']:,} of {len(labels):,} rows are in no cluster: {WHERE[config.noise]}")
        labels = _place_noise(features, labels, config.noise)
    labels = _by_size(labels)
    return Clustering(labels, facts)


def _place_noise(features: Features, labels: np.ndarray, how: str) -> np.ndarray:
    if how == "drop":
        return labels
    count = int(labels.max()) + 1
    lost = np.flatnonzero(labels == NOISE)
    labels = labels.copy()
    if how == "own":
        labels[lost] = count
        return labels
    sums = torch.zeros(count, features.width, dtype=torch.float64, device=features.device)
    for part, rows in features.parts(range(features.blocks)):
        inside = torch.from_numpy(np.flatnonzero(labels[part] != NOISE)).to(rows.device)
        owners = torch.from_numpy(labels[part].astype(np.int64)).to(rows.device)[inside]
        sums.index_add_(0, owners, rows[inside].double())
    directions = torch.nn.functional.normalize(sums, dim=1).float()
    labels[lost] = methods.nearest_labels(features.subset(lost), directions, np.arange(count), "placing noise")
    return labels


def _by_size(labels: np.ndarray) -> np.ndarray:
    """Renumbered by falling size, equal sizes by their first row; noise stays; int32."""
    inside = labels != NOISE
    names, first, place, sizes = np.unique(labels[inside], return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    number = np.empty(len(names), np.int32)
    number[order] = np.arange(len(names))
    found = np.full(len(labels), NOISE, np.int32)
    found[inside] = number[place]
    return found
