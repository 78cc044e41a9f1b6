"""Rows of a feature file as unit vectors, a block at a time, for clustering by cosine.

Coordinates are rounded to multiples of 2^-24, the resolution of single precision near 1, 8,192 times finer than their
half precision. Sums of up to 2^28 of them are exact in double precision, so a mean direction has the same bits in any
order, on any number of processes and on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from ds_llm.errors import UserError

BLOCK_NUMBERS, SMALLEST_BLOCK, LARGEST_BLOCK = 1 << 21, 512, 8192  # numbers of a block; rows of it
GRID = float(1 << 24)
HELD_SHARE = 0.5  # of the free memory that rows may take to be kept as they are used


class Features:
    """Some rows of a .npy file of numbers [N, ...], each flattened and divided by its length.

    rows: int64, their numbers in the file, ascending; none: all. Blocks are the same rows on every process, which works
    on its own run of them (`own`). `len` is the number of rows, of all processes.
    """

    def __init__(self, path: Path, rows: np.ndarray | None = None, device: torch.device | str = "cpu"):
        self.path, self.device = path, torch.device(device)
        try:
            table = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: is no feature file ({error})") from None
        self._table = table.reshape(len(table), -1)
        self.rows = np.arange(len(table)) if rows is None else rows
        self._held: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def block_rows(self) -> int:
        return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, BLOCK_NUMBERS // self.width))

    @property
    def width(self) -> int:
        return self._table.shape[1]

    @property
    def blocks(self) -> int:
        return -(-len(self) // self.block_rows)

    def usable(self) -> np.ndarray:
        """bool [rows]: whether a row has a direction: all its numbers are finite, and one is not 0."""
        found = np.empty(len(self), bool)
        for number in range(self.blocks):
            part = slice(number * self.block_rows, (number + 1) * self.block_rows)
            values = torch.from_numpy(self._table[self.rows[part]])
            found[part] = (values.isfinite().all(1) & (values != 0).any(1)).numpy()
        return found

    def subset(self, keep: np.ndarray) -> Features:
        """The rows at the ascending positions `keep`."""
        return Features(self.path, self.rows[keep], self.device)

    def sample(self, count: int, seed: int) -> Features:
        """At most `count` of the rows, drawn at random."""
        if count >= len(self):
            return self
        drawn = np.random.default_rng(seed).choice(len(self), count, replace=False)
        return self.subset(np.sort(drawn))

    def at(self, positions: np.ndarray) -> Tensor:
        """Rows at positions: float32 [positions, width] of length 1."""
        values = torch.from_numpy(np.ascontiguousarray(self._table[self.rows[positions]])).to(self.device).float()
        values /= torch.linalg.vector_norm(values, dim=1, keepdim=True)
        return values.mul_(GRID).round_().mul_(1 / GRID)

    def all(self) -> Tensor:
        """All rows in one tensor. Use it only if they fit the memory."""
        return torch.cat([block for _, block in self.parts(range(self.blocks))])

    def parts(self, numbers: range) -> Iterator[tuple[slice, Tensor]]:
        """(positions, rows) of blocks."""
        for number in numbers:
            first, last = number * self.block_rows, min(len(self), (number + 1) * self.block_rows)
            block = self._held.get(number)
            yield slice(first, last), self.at(np.arange(first, last)) if block is None else block

    def hold(self, numbers: range) -> None:
        """Keep blocks in memory for further use, as far as they fit."""
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else _free_memory()
        fitting = int(HELD_SHARE * free / (self.block_rows * self.width * 4))
        self._held = {number: block for number, (_, block) in zip(numbers, self.parts(numbers[:fitting]), strict=False)}

    def release(self) -> None:
        self._held = {}


def own_blocks(blocks: int, rank: int, ranks: int) -> range:
    """The run of blocks that a process works on."""
    return range(blocks * rank // ranks, blocks * (rank + 1) // ranks)


def _free_memory() -> int:
    return psutil.virtual_memory().available
