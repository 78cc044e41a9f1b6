"""Picks against plain loops over clusters; ties, remainders, distances."""

import itertools

import numpy as np
import pytest
from planted import RANDOM, planted

from ds_llm.selection import pick
from ds_llm.selection.features import Features


@pytest.fixture
def rows():
    """Quality with many ties, and labels, of 300 rows in clusters of very different sizes."""
    labels = RANDOM.choice(7, 300, p=RANDOM.dirichlet(np.ones(7)))
    return RANDOM.integers(0, 20, 300) / 20.0, labels


def queues(quality, labels) -> dict[int, list[int]]:
    """Rows of each cluster by falling quality, equal ones by position."""
    return {
        int(name): sorted(np.flatnonzero(labels == name).tolist(), key=lambda i: (-quality[i], i))
        for name in np.unique(labels)
    }


@pytest.mark.parametrize("count", [1, 6, 50, 299, 300])
def test_round_robin_takes_one_of_each_cluster_in_turn(rows, count):
    quality, labels = rows
    waiting, expected = queues(quality, labels), []
    while any(waiting.values()):
        turn = [queue.pop(0) for queue in waiting.values() if queue]
        expected += sorted(turn, key=lambda i: (-quality[i], i))
    assert pick.round_robin(quality, labels, count).tolist() == expected[:count]


@pytest.mark.parametrize("count", [1, 10, 123, 300])
def test_stratified_takes_each_clusters_share(rows, count):
    quality, labels = rows
    found = pick.stratified(quality, labels, count)
    assert len(found) == count == len(set(found.tolist()))
    for name, queue in queues(quality, labels).items():
        taken = [i for i in found.tolist() if labels[i] == name]
        assert taken == queue[: len(taken)] and abs(len(taken) - count * len(queue) / 300) < 1
    assert all(quality[a] >= quality[b] for a, b in itertools.pairwise(found))


def test_top_k_and_random(rows):
    quality, _ = rows
    assert pick.top_k(quality, 40).tolist() == sorted(range(300), key=lambda i: (-quality[i], i))[:40]
    drawn = pick.random(300, 40, 5)
    assert len(set(drawn.tolist())) == 40 and (drawn == pick.random(300, 40, 5)).all()
    assert (drawn != pick.random(300, 40, 6)).any()
    often = np.bincount(np.concatenate([pick.random(10, 3, seed) for seed in range(3000)]), minlength=10) / 3000
    np.testing.assert_allclose(often, 0.3, atol=0.05)


def test_farthest_points_spread_over_the_clusters(tmp_path):
    path = tmp_path / "features.npy"
    owner = planted(path, 400, 9, noise=0.02)
    quality = RANDOM.random(400)
    found = pick.farthest(quality, Features(path), 30)
    assert found[0] == quality.argmax() and len(set(found.tolist())) == 30
    assert set(owner[found[:9]]) == set(range(9))
    rows = Features(path).all().double().numpy()
    for i in (1, 4, 8):  # all 24 components are kept, so distances are those of the rows
        reach = np.linalg.norm(rows[:, None] - rows[found[:i]], axis=-1).min(1)
        assert reach[found[i]] == pytest.approx(reach.max(), rel=1e-3)
