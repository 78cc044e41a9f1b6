"""Every method finds planted clusters, on all rows and from a sample; k, noise and numbering."""

import numpy as np
import pytest
from planted import RANDOM, planted
from sklearn.metrics import adjusted_rand_score

from ds_llm.errors import ConfigError, UserError
from ds_llm.selection import clustering, methods, options
from ds_llm.selection.clustering import NOISE, cluster
from ds_llm.selection.features import Features
from ds_llm.selection.options import ClusterConfig

GIVEN = {"hdbscan": {"min_cluster_size": 40}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "features.npy"


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("method", ["kmeans", "minibatch", "hdbscan", "gmm", "spectral"])
def test_planted_clusters_are_found(method, sampled, path, monkeypatch):
    owner = planted(path, 900, 4, noise=0.1)
    if sampled:
        monkeypatch.setattr(methods, "CURVE_ROWS", 400)
        monkeypatch.setattr(methods, "SAMPLE_ROWS", {"sklearn": 400})
        monkeypatch.setattr(methods.spherical, "SEED_ROWS", 400)
    found = cluster(Features(path), ClusterConfig(method=method, **GIVEN.get(method, {"k": 4})))
    assert adjusted_rand_score(found.labels, owner) > 0.9
    sizes = np.bincount(found.labels)
    assert found.labels.dtype == np.int32 and (np.diff(sizes) <= 0).all() and found.count == len(sizes)
    assert found.facts["method"] == method
    again = cluster(Features(path), ClusterConfig(method=method, **GIVEN.get(method, {"k": 4})))
    assert (again.labels == found.labels).all()


@pytest.mark.parametrize("method", ["kmeans", "gmm"])
def test_k_is_chosen_where_clusters_end(method, path):
    owner = planted(path, 500, 6, noise=0.05)
    found = cluster(Features(path), ClusterConfig(method=method, k_range=[2, 12]))
    curve = found.facts["curve"]
    assert curve["chosen"] == found.facts["k"] and 5 <= curve["chosen"] <= 8
    assert curve["k"][0] == 2 and curve["k"][-1] == 12 and len(curve["value"]) == len(curve["k"])
    assert adjusted_rand_score(found.labels, owner) > 0.8


def test_the_bend_of_a_curve():
    k = np.arange(2, 30)
    for corner in RANDOM.integers(5, 25, 5):
        value = np.where(k < corner, 10 - 8 * (k - 2) / (corner - 2), 2 - (k - corner) / 30)
        assert k[methods.bend(k, value)] == corner
    assert methods.bend(k, np.ones(len(k))) == 0 and methods.bend(k[:2], np.array([2.0, 1.0])) == 0


def test_scikit_learn_gives_the_same_k_means(path):
    planted(path, 800, 5, noise=0.1)
    ours, theirs = (cluster(Features(path), ClusterConfig(k=5, backend=name)) for name in ("torch", "sklearn"))
    assert adjusted_rand_score(ours.labels, theirs.labels) > 0.99 and theirs.facts["backend"] == "sklearn"


def test_noise_is_dropped_placed_or_by_itself(path):
    owner = planted(path, 600, 3, noise=0.05)
    values = np.load(path)
    values[:30] = RANDOM.dirichlet(np.ones(values.shape[-1]) * 0.1, values[:30].shape[:-1])
    np.save(path, values)
    found = {
        how: cluster(Features(path), ClusterConfig(method="hdbscan", min_cluster_size=60, noise=how))
        for how in ("drop", "own", "nearest")
    }
    lost = found["drop"].labels == NOISE
    assert lost[:30].mean() > 0.4 and lost[30:].mean() < 0.1 and found["drop"].facts["noise"] == lost.sum()
    assert found["drop"].count == 3 and adjusted_rand_score(owner[~lost], found["drop"].labels[~lost]) > 0.95
    own = found["own"].labels
    assert found["own"].count == 4 and len(set(own[lost])) == 1 and not set(own[lost]) & set(own[~lost])
    near = found["nearest"].labels
    rows = values.reshape(600, -1).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    means = np.stack([rows[(near == j) & ~lost].sum(0) for j in range(3)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert ((rows @ means.T).argmax(1)[lost] == near[lost]).all() and found["nearest"].count == 3


def test_hdbscan_tunes_the_size_of_clusters(path, monkeypatch):
    owner = planted(path, 700, 5, noise=0.05)
    facts = cluster(Features(path), ClusterConfig(method="hdbscan")).facts
    best = max(facts["trials"], key=lambda trial: (trial["score"], trial["min_cluster_size"]))
    assert facts["min_cluster_size"] == best["min_cluster_size"] and best["clusters"] == 5 == len(set(owner))
    np.save(path, RANDOM.dirichlet(np.ones(24), 100).astype(np.float16))
    with pytest.raises(UserError, match="no cluster of at least 90 rows"):
        cluster(Features(path), ClusterConfig(method="hdbscan", min_cluster_size=90))


def test_numbering_is_by_size_then_by_first_row():
    found = clustering._by_size(np.array([7, 3, 3, -1, 9, 9, 5, 7]))
    assert found.tolist() == [0, 1, 1, NOISE, 2, 2, 3, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k_range": [9, 3]}, r"k_range: \[9, 3\] must be two numbers"),
        ({"method": "gmm", "backend": "torch"}, "gmm has no torch; it has sklearn"),
        ({"backend": "cuml"}, "needs a GPU, cuml and cupy"),
    ],
)
def test_impossible_options_are_refused(given, message):
    overrides = [f"cluster.{name}={value}" for name, value in given.items()]
    with pytest.raises(ConfigError, match=message):
        options.load(None, ["score.model=m", "score.data=d", *overrides])
