"""Processes that cluster the rows of a file together; rank 0 writes what came out. Arguments: features, k, output."""

import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

from ds_llm.selection import methods
from ds_llm.selection.features import Features
from ds_llm.selection.options import ClusterConfig
from ds_llm.selection.spherical import joined, kmeans


def main(path: Path, k: int, out: Path) -> None:
    features = Features(path)
    facts: dict = {}
    with joined():
        found = kmeans(features, k, 3, together=True)
        methods.elbow(features, ClusterConfig(k_range=[2, 4]), facts, team=True)
        if dist.get_rank() == 0:
            np.savez(out, labels=found.labels, centroids=found.centroids, inertia=found.inertia, **facts["curve"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
