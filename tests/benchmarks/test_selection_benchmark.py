"""The benchmark of selection: features that are probabilities, contestants that do the same, the right inertia."""

import numpy as np
import pytest

from benchmarks.selection import inertia, make_features, selection, sklearn


def test_contestants_cluster_the_same_rows_as_well(tmp_path):
    path = tmp_path / "router.npy"
    make_features(path, 900, 3, 8, np.random.default_rng().integers(1 << 30))
    features = np.load(path)
    assert features.shape == (900, 3, 8) and features.dtype == np.float16
    np.testing.assert_allclose(features.sum(-1, dtype=np.float64), 1, atol=5e-3)
    ours = selection(path, {"k": 9, "seed": 1})
    theirs = sklearn(path, {"k": 9, "seed": 1})["sklearn"]
    assert ours["selection"]["k"] == 9 and ours["selection"]["picked"] == 45
    assert ours["selection"]["seconds"] >= ours["k-means"]["seconds"] > 0
    rows = features.reshape(900, -1).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for found in (ours["k-means"], theirs):
        means = [rows[found["labels"] == label].mean(0) for label in range(9)]
        means = [mean / np.linalg.norm(mean) for mean in means]
        expected = sum(1 - rows[i] @ means[label] for i, label in enumerate(found["labels"]))
        assert inertia(path, found["labels"]) == pytest.approx(expected, rel=1e-5)
    assert inertia(path, ours["k-means"]["labels"]) == pytest.approx(inertia(path, theirs["labels"]), rel=0.05)
