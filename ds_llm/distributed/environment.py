"""Which process of the job this one is, as the launcher set it in the environment."""

from __future__ import annotations

import os


def rank() -> int:
    """Global rank of this process as the launcher set it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of the job as the launcher set it; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
