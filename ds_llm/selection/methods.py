"""Clustering methods: K-means, mini-batch K-means, HDBSCAN, Gaussian mixtures, spectral clustering.

Each takes features, options, the library and a dictionary for facts to report, and returns a label per row, int64
[rows]. K-means is our own (see `spherical`) and gives the same labels on CPU and GPU and on any number of processes.
The others are scikit-learn's or cuML's. HDBSCAN and spectral clustering cannot take many rows: they cluster a random
sample, and every other row gets the label of its nearest row of the sample.
"""

from __future__ import annotations

import numpy as np
import torch

from ds_llm.errors import UserError
from ds_llm.progress import console, progress
from ds_llm.selection import spherical
from ds_llm.selection.features import Features
from ds_llm.selection.options import ClusterConfig, together

NOISE = -1  # label of a row that is in no cluster
CURVE_ROWS, CURVE_POINTS = 20_000, 10  # on which, and at how many k, the curve that chooses k is measured
SAMPLE_ROWS = {"sklearn": 8_192, "cuml": 100_000}  # of methods that cannot take all
SIZES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)  # of the rows: min_cluster_size that are tried
JUDGED_ROWS = 4_000  # on which a trial is judged
GMM_WIDTH = 16  # principal components of which mixtures are made
MINIBATCH_ROWS, MINIBATCH_PASSES = 4_096, 3


def kmeans(features: Features, config: ClusterConfig, backend: str, facts: dict) -> np.ndarray:
    team = together(config)
    k = facts["k"] = min(config.k or elbow(features, config, facts, team), len(features))
    if backend == "torch":
        found = spherical.kmeans(features, k, config.seed, config.max_iters, team)
        facts |= {"inertia": found.inertia, "passes": found.iterations, "converged": found.converged}
        return found.labels
    rows, first = features.all(), spherical.seeds(features, k, config.seed)
    if backend == "cuml":
        import cupy
        from cuml.cluster import KMeans

        model = KMeans(n_clusters=k, init=cupy.from_dlpack(first), n_init=1, max_iter=config.max_iters)
        return cupy.asnumpy(model.fit_predict(cupy.from_dlpack(rows)))
    from sklearn.cluster import KMeans

    return KMeans(k, init=first.cpu().numpy(), n_init=1, max_iter=config.max_iters).fit_predict(rows.cpu().numpy())


def minibatch(features: Features, config: ClusterConfig, backend: str, facts: dict) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans

    k = facts["k"] = min(config.k or elbow(features, config, facts), len(features))
    random = np.random.default_rng(config.seed)
    first = spherical.seeds(features, k, config.seed).cpu().numpy()
    model = MiniBatchKMeans(k, init=first, n_init=1, random_state=config.seed, batch_size=MINIBATCH_ROWS)
    with progress("mini-batches", MINIBATCH_PASSES * len(features), "rows") as task:
        for _ in range(MINIBATCH_PASSES):
            order = random.permutation(len(features))
            for start in range(0, len(order), MINIBATCH_ROWS):
                batch = np.sort(order[start : start + MINIBATCH_ROWS])
                model.partial_fit(features.at(batch).cpu().numpy())
                task.advance(len(batch))
    centroids = torch.nn.functional.normalize(torch.from_numpy(model.cluster_centers_).float(), dim=1)
    return nearest_labels(features, centroids.to(features.device), np.arange(k), "assigning")


def hdbscan(features: Features, config: ClusterConfig, backend: str, facts: dict) -> np.ndarray:
    sample = features.sample(SAMPLE_ROWS[backend], config.seed)
    share = len(sample) / len(features)
    rows = sample.all()
    fit = _cuml_hdbscan(rows) if backend == "cuml" else _sklearn_hdbscan(rows)
    least = None if config.min_samples is None else max(1, round(config.min_samples * share))
    if config.min_cluster_size:
        sizes = [config.min_cluster_size]
    else:
        sizes = sorted({max(5, round(part * len(features))) for part in SIZES})
    best, trials = None, []
    with progress("hdbscan", len(sizes), "trials") as task:
        for size in sizes:
            labels = fit(max(2, round(size * share)), least)
            worth = _worth(rows, labels, config.seed)
            trials.append({"min_cluster_size": size, **worth})
            if labels.max(initial=-1) >= 0 and (best is None or worth["score"] >= best[0]):
                best = worth["score"], size, labels
            task.advance()
    facts |= {"sample": len(sample), "trials": trials}
    if best is None:
        raise UserError(
            f"hdbscan: no cluster of at least {sizes[0]:,} rows; give cluster.min_cluster_size a smaller number, or "
            "choose another cluster.method"
        )
    facts["min_cluster_size"] = best[1]
    return _spread(features, sample, best[2])


def gmm(features: Features, config: ClusterConfig, backend: str, facts: dict) -> np.ndarray:
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    sample = features.sample(CURVE_ROWS, config.seed).all().cpu().numpy()
    pca = PCA(min(GMM_WIDTH, *sample.shape), random_state=config.seed).fit(sample)
    unit = max(float(np.sqrt(pca.explained_variance_[0])), 1e-12)  # the library's small constants expect such values
    points = pca.transform(sample) / unit

    def fit(k: int) -> GaussianMixture:
        return GaussianMixture(
            k, init_params="k-means++", max_iter=config.max_iters, reg_covar=1e-4, random_state=config.seed
        ).fit(points)

    if config.k:
        model = fit(min(config.k, len(points)))
    else:
        tried = {}
        with progress("choosing k", None, "trials") as task:
            for k in _candidates(config, len(points)):
                tried[k] = fit(k)
                task.advance()
        values = [float(found.bic(points)) for found in tried.values()]
        chosen = list(tried)[int(np.argmin(values))]
        facts["curve"] = {
            "name": "Bayesian information criterion", "k": list(tried), "value": values, "chosen": chosen
        }  # fmt: skip
        model = tried[chosen]
    facts |= {"k": model.n_components, "sample": len(sample), "converged": bool(model.converged_)}
    labels = np.empty(len(features), np.int64)
    with progress("assigning", len(features), "rows") as task:
        for part, rows in features.parts(range(features.blocks)):
            labels[part] = model.predict(pca.transform(rows.cpu().numpy()) / unit)
            task.advance(len(rows))
    return labels


def spectral(features: Features, config: ClusterConfig, backend: str, facts: dict) -> np.ndarray:
    from sklearn.cluster import SpectralClustering

    sample = features.sample(SAMPLE_ROWS[backend], config.seed)
    k = facts["k"] = min(config.k or elbow(features, config, facts), len(sample) - 1)
    facts["sample"] = len(sample)
    console.print(f"spectral clustering of {len(sample):,} rows")
    # the nearest neighbours of unit vectors by distance are those by cosine
    model = SpectralClustering(
        k, affinity="nearest_neighbors", n_neighbors=min(10, len(sample) - 1), assign_labels="cluster_qr",
        random_state=config.seed,
    )  # fmt: skip
    return _spread(features, sample, model.fit_predict(sample.all().cpu().numpy()))


def elbow(features: Features, config: ClusterConfig, facts: dict, team: bool = False) -> int:
    """k where the curve of the mean distance to the centroid bends most: of `_candidates`, on a sample, the one that is
    farthest below the line from the curve's first point to its last (Satopää et al. 2011, "Finding a Kneedle in a
    Haystack"). The curve goes to `facts`."""
    sample = features.sample(CURVE_ROWS, config.seed)
    candidates, values = _candidates(config, len(sample)), []
    for number, k in enumerate(candidates, 1):
        title = f"elbow {number}/{len(candidates)}, k={k}"
        found = spherical.kmeans(sample, k, config.seed, config.max_iters, team, title)
        values.append(found.inertia / len(sample))
    chosen = candidates[bend(np.array(candidates), np.array(values))]
    facts["curve"] = {"name": "mean distance to the centroid", "k": candidates, "value": values, "chosen": chosen}
    console.print(f"elbow at k={chosen} of {candidates[0]} to {candidates[-1]}")
    return chosen


def bend(k: np.ndarray, value: np.ndarray) -> int:
    """Position at which a falling curve [n] is farthest below its chord, both axes scaled to [0, 1]."""
    if len(k) < 3 or value[0] <= value[-1]:
        return 0
    x = (k - k[0]) / (k[-1] - k[0])
    y = (value - value[-1]) / (value[0] - value[-1])
    return int(np.argmax(1 - x - y))


def _candidates(config: ClusterConfig, rows: int) -> list[int]:
    low, high = (min(k, rows) for k in config.k_range)
    return sorted({round(k) for k in np.geomspace(low, high, CURVE_POINTS)})


def _sklearn_hdbscan(rows: torch.Tensor):
    from sklearn.cluster import HDBSCAN

    values = rows.double()
    distances = (1 - values @ values.T).clamp_(0, 2).fill_diagonal_(0).cpu().numpy()

    def fit(size: int, least: int | None) -> np.ndarray:
        least = None if least is None else min(least, len(distances))
        model = HDBSCAN(min_cluster_size=min(size, len(distances)), min_samples=least, metric="precomputed", copy=True)
        return model.fit_predict(distances)

    return fit


def _cuml_hdbscan(rows: torch.Tensor):
    import cupy
    from cuml.cluster import HDBSCAN

    values = cupy.from_dlpack(rows)  # it knows no cosine; on unit vectors distance is sqrt(2 - 2 cosine)

    def fit(size: int, least: int | None) -> np.ndarray:
        return cupy.asnumpy(HDBSCAN(min_cluster_size=size, min_samples=least).fit_predict(values))

    return fit


def _worth(rows: torch.Tensor, labels: np.ndarray, seed: int) -> dict:
    """Quality of a trial: silhouette (by cosine, of the rows in clusters) times the share of rows in clusters."""
    from sklearn.metrics import silhouette_score

    inside = np.flatnonzero(labels != NOISE)
    share = len(inside) / len(labels)
    judged = np.random.default_rng(seed).permutation(inside)[:JUDGED_ROWS]
    silhouette = 0.0
    if 1 < len(np.unique(labels[judged])) < len(judged):
        silhouette = float(silhouette_score(rows[judged].cpu().numpy(), labels[judged], metric="cosine"))
    count = len(np.unique(labels[inside]))
    return {"clusters": count, "in clusters": share, "silhouette": silhouette, "score": round(share * silhouette, 6)}


def _spread(features: Features, sample: Features, labels: np.ndarray) -> np.ndarray:
    """Labels of all rows, from the labels [sample] of a sample: other rows get that of their nearest sampled row."""
    if sample is features:
        return labels
    found = nearest_labels(features, sample.all(), labels, "joining the nearest sampled rows")
    found[np.searchsorted(features.rows, sample.rows)] = labels
    return found


def nearest_labels(features: Features, directions: torch.Tensor, labels: np.ndarray, title: str) -> np.ndarray:
    """For each row the label of the direction that it is nearest to; directions [m, width], labels [m]."""
    found = np.empty(len(features), np.int64)
    with progress(title, len(features), "rows") as task:
        for part, rows in features.parts(range(features.blocks)):
            found[part] = labels[spherical.nearest(rows, directions)[1].cpu().numpy()]
            task.advance(len(rows))
    return found
