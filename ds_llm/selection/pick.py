"""Methods that pick rows by their cluster, their quality and their features.

Every method returns positions of rows, int64 [count], the first choice first. All but `random`, which has a seed, are
deterministic: of equal rows the one that comes first in the data is picked first.
"""

from __future__ import annotations

import numpy as np
import torch

from ds_llm.progress import progress
from ds_llm.selection.features import Features

FARTHEST_WIDTH, FARTHEST_FIT_ROWS = 32, 20_000  # principal components of farthest-point picks, and rows that give them


def by_quality(quality: np.ndarray) -> np.ndarray:
    """Positions by falling quality, float64 [n]."""
    return np.argsort(-quality, kind="stable")


def round_robin(quality: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """The best row of every cluster, then the second best of every cluster, and so on; within such a round by falling
    quality. labels: [n], of any numbers."""
    order = by_quality(quality)
    return order[np.argsort(_ranks(labels[order]), kind="stable")][:count]


def stratified(quality: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """The best rows of each cluster, as many as its share of the rows: count * size / n, rounded down, and one more for
    the clusters with the largest remainders, larger ones first."""
    names, place, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    exact = [count * int(size) for size in sizes]
    shares = np.array([value // len(labels) for value in exact])
    remainders = [value % len(labels) for value in exact]
    most = sorted(range(len(names)), key=lambda i: (-remainders[i], -sizes[i], names[i]))
    shares[most[: count - int(shares.sum())]] += 1
    order = by_quality(quality)
    return order[_ranks(labels[order]) < shares[place[order]]]


def top_k(quality: np.ndarray, count: int) -> np.ndarray:
    """The best rows."""
    return by_quality(quality)[:count]


def random(rows: int, count: int, seed: int) -> np.ndarray:
    """Random rows with equal probability."""
    return np.random.default_rng(seed).permutation(rows)[:count]


def farthest(quality: np.ndarray, features: Features, count: int) -> np.ndarray:
    """Rows far from each other: the best one, then always the one whose nearest chosen row is farthest (Gonzalez 1985).
    Distances are those of the first principal components of the features."""
    points = _components(features)
    chosen = np.empty(count, np.int64)
    reach = torch.full((len(points),), torch.inf, device=points.device)
    following = int(by_quality(quality)[0])
    with progress("farthest points", count, "rows") as task:
        for i in range(count):
            chosen[i] = following
            reach = torch.minimum(reach, (points - points[following]).square_().sum(1))
            reach[following] = -1  # even where others are equal to it
            following = int(reach.argmax())
            task.advance()
    return chosen


def _components(features: Features) -> torch.Tensor:
    """float32 [rows, at most FARTHEST_WIDTH]."""
    from sklearn.decomposition import PCA

    fitted = features.sample(FARTHEST_FIT_ROWS, 0).all().cpu().numpy()
    pca = PCA(min(FARTHEST_WIDTH, *fitted.shape), random_state=0).fit(fitted)
    axes, middle = (torch.from_numpy(a).to(features.device) for a in (pca.components_.T.copy(), pca.mean_))
    return torch.cat([(rows - middle) @ axes for _, rows in features.parts(range(features.blocks))])


def _ranks(labels: np.ndarray) -> np.ndarray:
    """Number of earlier rows with the same label, int64 [n]."""
    order = np.argsort(labels, kind="stable")
    sorted_labels = labels[order]
    starts = np.searchsorted(sorted_labels, sorted_labels, "left")
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - starts
    return ranks
