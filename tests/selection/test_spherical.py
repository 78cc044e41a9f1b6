"""K-means by cosine against its definition in float64 and against scikit-learn; on two processes to the same bits."""

from pathlib import Path

import numpy as np
import pytest
from jobs import launch
from planted import RANDOM, planted
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from ds_llm.errors import UserError
from ds_llm.selection import features as blocks
from ds_llm.selection import methods, spherical
from ds_llm.selection.features import Features, own_blocks
from ds_llm.selection.options import ClusterConfig
from ds_llm.selection.spherical import kmeans


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "features.npy"


def directions(path: Path) -> np.ndarray:
    values = np.load(path).reshape(len(np.load(path)), -1).astype(np.float64)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_rows_are_directions_and_rows_without_one_are_found(path, monkeypatch):
    planted(path, 50, 4)
    values = np.load(path)
    values[3], values[7, 0, 0], values[20, 1, 2] = 0, np.nan, np.inf
    np.save(path, values)
    monkeypatch.setattr(blocks, "LARGEST_BLOCK", 16)
    usable = Features(path).usable()
    assert np.flatnonzero(~usable).tolist() == [3, 7, 20]
    some = Features(path).subset(np.flatnonzero(usable)).sample(30, 1)
    assert len(some) == 30 and (np.diff(some.rows) > 0).all() and not {3, 7, 20} & set(some.rows.tolist())
    found = some.all().numpy()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found, directions(path)[some.rows], atol=2**-23)
    assert (found * 2.0**24 == np.round(found * 2.0**24)).all()
    assert [len(own_blocks(7, rank, 3)) for rank in range(3)] == [2, 2, 3]
    (path.parent / "x.npy").write_text("text")
    with pytest.raises(UserError, match="is no feature file"):
        Features(path.parent / "x.npy")


def test_sums_of_rows_do_not_depend_on_their_order(path):
    planted(path, 3000, 5)
    rows = Features(path).all().double()
    shuffled = rows[RANDOM.permutation(3000)]
    assert (rows.sum(0) == shuffled.sum(0)).all() and (rows.sum(0) == rows.flip(0).cumsum(0)[-1]).all()


def test_lloyds_iterations_are_those_of_the_definition(path):
    planted(path, 900, 7, noise=1.0)  # clusters that overlap: several passes
    features, rows = Features(path), directions(path)
    found = kmeans(features, 6, 5)
    centroids = spherical.seeds(features, 6, 5).double().numpy()
    for _ in range(found.iterations):
        used = centroids
        labels = (rows @ used.T).argmax(1)
        sums = np.stack([rows[labels == j].sum(0) for j in range(6)])
        centroids = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    assert found.converged and 3 < found.iterations < 300
    assert (found.labels == labels).mean() > 0.995  # a row between two may go either way
    np.testing.assert_allclose(found.centroids, used, atol=1e-3)
    assert found.inertia == pytest.approx((1 - (rows * used[labels]).sum(1)).sum(), rel=1e-3)
    assert kmeans(features, 6, 5, max_iters=2).converged is False


def test_it_is_as_good_as_scikit_learns(path):
    owner = planted(path, 4000, 12)
    found = kmeans(Features(path), 12, 0)
    rows = directions(path)
    theirs = KMeans(12, n_init=1, init=spherical.seeds(Features(path), 12, 0).numpy()).fit(rows)
    means = theirs.cluster_centers_ / np.linalg.norm(theirs.cluster_centers_, axis=1, keepdims=True)
    assert found.inertia == pytest.approx((1 - (rows * means[theirs.labels_]).sum(1)).sum(), rel=0.01)
    assert adjusted_rand_score(found.labels, theirs.labels_) > 0.98
    assert adjusted_rand_score(found.labels, owner) > 0.8  # seeds may fall twice into one cluster


def test_centroids_without_rows_move_to_far_rows(path, monkeypatch):
    planted(path, 600, 8, noise=0.05)
    features = Features(path)
    one = features.at(np.zeros(8, np.int64))  # all start from one row: seven of them get none
    monkeypatch.setattr(spherical, "seeds", lambda *_: one)
    found = kmeans(features, 8, 0)
    assert len(np.unique(found.labels)) == 8
    np.save(path, np.repeat(np.load(path)[:3], 50, axis=0))  # three different rows for eight centroids
    monkeypatch.undo()
    found = kmeans(Features(path), 8, 0)
    assert len(np.unique(found.labels)) == 3 and found.inertia < 1e-4 and found.converged


def test_two_processes_get_the_bits_of_one(path):
    planted(path, 17001, 9, noise=0.3)  # three blocks, so unequal shares
    out = path.parent / "found.npz"
    done = launch("forked", [str(path), "11", str(out)], script=Path(__file__).with_name("kmeans_worker.py"))
    assert done.returncode == 0, done.stderr
    two, one = np.load(out), kmeans(Features(path), 11, 3)
    assert (two["labels"] == one.labels).all() and two["labels"].dtype == np.int32
    assert two["centroids"].tobytes() == one.centroids.tobytes() and float(two["inertia"]) == one.inertia
    facts: dict = {}
    assert methods.elbow(Features(path), ClusterConfig(k_range=[2, 4]), facts) == int(two["chosen"])
    assert two["value"].tolist() == facts["curve"]["value"]
