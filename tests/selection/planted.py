"""Features with known clusters, like those of routers: means of probabilities, in half precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np

RANDOM = np.random.default_rng()


def planted(path: Path, rows: int, clusters: int, noise: float = 0.2, shape=(3, 8)) -> np.ndarray:
    """Write features [rows, *shape] of rows in random clusters; returns the cluster of each, int64 [rows]."""
    centres = RANDOM.normal(size=(clusters, *shape)) * 1.5
    owner = np.concatenate([np.arange(clusters), RANDOM.integers(clusters, size=rows - clusters)])
    RANDOM.shuffle(owner)
    scores = np.exp(centres[owner] + noise * RANDOM.normal(size=(rows, *shape)))
    np.save(path, (scores / scores.sum(-1, keepdims=True)).astype(np.float16))
    return owner
