"""K-means by cosine (spherical K-means; Dhillon and Modha 2001, "Concept decompositions for large sparse text data"),
on one process or on all of a job.

Every process reads only its rows. Per iteration they exchange counts and one sum per cluster, of the rows that changed
their cluster; these sums are exact (see `features`), so centroids and labels have the same bits on any number of
processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ds_llm.distributed.collectives import gather
from ds_llm.errors import UserError
from ds_llm.progress import Task, progress
from ds_llm.selection.features import Features, own_blocks

SEED_ROWS = 20_000  # of which k-means++ chooses the first centroids
STILL = 1e-4  # share of the rows that may yet move at the end
SAME = 1e-6  # distance within which a row is no centroid of its own


@dataclass
class Clusters:
    """labels: int32 [rows]; centroids: float32 [k, width], unit vectors; inertia: sum over the rows of 1 - cosine to
    their centroid; iterations: passes over the rows; converged: false where `max_iters` ended it."""

    labels: np.ndarray
    centroids: np.ndarray
    inertia: float
    iterations: int
    converged: bool


def kmeans(
    features: Features, k: int, seed: int, max_iters: int = 300, together: bool = False, title: str = "k-means"
) -> Clusters:
    """Cluster rows into at most k clusters. together: every process of the open process group calls it, works on its
    share of the rows and gets the same.

    It ends when no more than `STILL` of the rows change their cluster, or after `max_iters` passes. A centroid that no
    row is nearest to moves to the row farthest from its own, unless that is none but rounding away.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    k = min(k, len(features))
    centroids = seeds(features, k, seed)
    if together:
        dist.broadcast(centroids, 0)  # other machines may round differently
    own = own_blocks(features.blocks, rank, ranks)
    features.hold(own)
    state = _State(features, own, k, together)
    with progress(title, None, "rows") as task:
        for iteration in range(1, max_iters + 1):
            moved = state.assign(centroids, task)
            converged = moved <= STILL * len(features)
            task.advance(0, f"pass {iteration}, {moved / len(features):.2%} of the rows moved")
            before, centroids = centroids, state.mean_directions(centroids)
            if converged and (state.counts.all() or torch.equal(before, centroids)):
                break
    features.release()
    labels, similarity = state.gathered()
    inertia = float((1 - similarity.astype(np.float64)).sum())
    return Clusters(labels, before.cpu().numpy(), inertia, iteration, converged)


@contextmanager
def joined() -> Iterator[None]:
    """Open a process group of torch while the block runs, without DeepSpeed; an open group stays open."""
    if dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group("nccl" if cuda else "gloo")
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise UserError(
            f"port {port}: another job on this machine uses it; choose another one, for example deepspeed "
            "--master_port 29600 ... (torchrun: --master-port)",
            any_rank=True,
        ) from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def seeds(features: Features, k: int, seed: int) -> Tensor:
    """First centroids by greedy k-means++ (Arthur and Vassilvitskii 2007) on a sample: float32 [k, width]."""
    from sklearn.cluster import kmeans_plusplus

    sample = features.sample(max(SEED_ROWS, 5 * k), seed)
    _, chosen = kmeans_plusplus(sample.all().cpu().numpy(), k, random_state=seed)
    return sample.at(np.asarray(chosen))


def nearest(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Highest cosine [rows] and its centroid, int64 [rows]; the first one of equal ones."""
    return (rows @ centroids.T).max(1)


class _State:
    """The clusters of this process's rows, and the sums of all rows of each cluster."""

    def __init__(self, features: Features, own: range, k: int, together: bool):
        self.features, self.own, self.together = features, own, together
        device = features.device
        self.first = min(len(features), own.start * features.block_rows)
        count = min(len(features), own.stop * features.block_rows) - self.first
        self.labels = torch.full((count,), -1, dtype=torch.int64, device=device)
        self.similarity = torch.zeros(count, device=device)
        # of each cluster the sum of its rows and, last, their number; below them how many rows have changed
        self.totals = torch.zeros(k + 1, features.width + 1, dtype=torch.float64, device=device)
        # rows on their way there; kept, because fresh memory costs more than the sums
        self._ones = torch.ones(features.block_rows, features.width + 1, dtype=torch.float64, device=device)

    @property
    def counts(self) -> Tensor:
        """Rows of each cluster, float64 [k]."""
        return self.totals[:-1, -1]

    def assign(self, centroids: Tensor, task: Task) -> int:
        """Give every row its nearest centroid; returns how many rows of all processes changed."""
        change = torch.zeros_like(self.totals)
        for part, rows in self.features.parts(self.own):
            here = slice(part.start - self.first, part.stop - self.first)
            self.similarity[here], labels = nearest(rows, centroids)
            before = self.labels[here]
            changed = (labels != before).nonzero()[:, 0]
            if len(changed):
                values = self._ones[: len(changed)]
                values[:, :-1] = rows if len(changed) == len(rows) else rows[changed]
                new, old = labels[changed], before[changed]
                change.index_add_(0, new, values)
                if old[0] >= 0:  # all have a cluster but in the first pass
                    change.index_add_(0, old, values, alpha=-1)
                change[-1, -1] += len(changed)
                self.labels[here] = labels
            task.advance(len(rows))
        if self.together:
            dist.all_reduce(change)
        self.totals += change
        return int(change[-1, -1])

    def mean_directions(self, centroids: Tensor) -> Tensor:
        """New centroids; those without rows move to the rows farthest from their own."""
        sums = self.totals[:-1, :-1]
        length = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
        found = torch.where(length > 0, sums / length, centroids.double()).float()
        empty = (self.counts == 0).nonzero()[:, 0].tolist()
        if empty:
            for cluster, row in zip(empty, self._farthest(len(empty)), strict=False):
                found[cluster] = self.features.at(np.array([row]))[0]
        return found

    def _farthest(self, count: int) -> list[int]:
        """Positions of the rows least similar to their centroids, of all processes, equal ones by position."""
        similarity = self.similarity.cpu().numpy()
        order = np.argsort(similarity, kind="stable")[:count]
        own = [(float(similarity[i]), self.first + int(i)) for i in order if similarity[i] < 1 - SAME]
        return [row for _, row in sorted(chain.from_iterable(self._gather(own)))[:count]]

    def gathered(self) -> tuple[np.ndarray, np.ndarray]:
        """Labels int32 and similarities float32 of the rows of all processes."""
        own = (self.labels.to(torch.int32).cpu().numpy(), self.similarity.cpu().numpy())
        parts = self._gather(own)
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def _gather(self, value) -> list:
        """The value of every process."""
        return gather(value) if self.together else [value]
