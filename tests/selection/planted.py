"""Features with known clusters, like those of routers: means of probabilities, in half precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np

RANDOM = np.random.default_rng()


def planted(path: Path, rows: int, clusters: int, noise: float = 0.2, shape=(3, 8)) -> np.ndarray:
    """Write features [rows, *shape] of rows in random clusters; returns the cluster of each, int64 [rows]."""
    # clusters that touch by chance are fewer than planted: of some draws the one whose centres are farthest apart
    centres = max((RANDOM.normal(size=(clusters, *shape)) * 1.5 for _ in range(20)), key=_closest)
    owner = np.concatenate([np.arange(clusters), RANDOM.integers(clusters, size=rows - clusters)])
    RANDOM.shuffle(owner)
    scores = np.exp(centres[owner] + noise * RANDOM.normal(size=(rows, *shape)))
    np.save(path, (scores / scores.sum(-1, keepdims=True)).astype(np.float16))
    return owner


def _closest(centres: np.ndarray) -> float:
    """Distance of the two centres that are closest, as the features show them."""
    shares = np.exp(centres)
    points = (shares / shares.sum(-1, keepdims=True)).reshape(len(centres), -1)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    return distances[~np.eye(len(points), dtype=bool)].min(initial=np.inf)
