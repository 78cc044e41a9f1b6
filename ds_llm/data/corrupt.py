"""Corrupted copies of training samples, from which a model can learn to distinguish the samples.

A copy is a pure function of the seed and the sample's number; it depends neither on the batch nor on the process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ds_llm.data.batches import Samples

SPAN = (3, 16)  # least and most tokens of a repeated span
SHARE = (0.15, 0.6)  # least and largest share of replaced tokens


def shuffle(ids: np.ndarray, other: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """All tokens in random order."""
    return random.permutation(ids)


def repeat(ids: np.ndarray, other: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One span of `SPAN` tokens over and over."""
    length = min(int(random.integers(*SPAN)), max(len(ids) // 2, 1))
    start = int(random.integers(len(ids) - length + 1))
    return np.resize(ids[start : start + length], len(ids))


def replace(ids: np.ndarray, other: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A random `SHARE` of the tokens replaced by tokens of another sample."""
    chosen = random.random(len(ids)) < random.uniform(*SHARE)
    return np.where(chosen, random.choice(other, len(ids)), ids)


CORRUPTIONS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "shuffle": shuffle,
    "repeat": repeat,
    "replace": replace,
}


class CorruptedPairs:
    """Samples whose batches also hold a corrupted copy of every document.

    samples: their batches have `input_ids` [B, S], and either `position_ids` that restart with every document of a row
    and `token_mask`, or `attention_mask`. kinds: names in `CORRUPTIONS`; one is drawn for each document. fixed: ids of
    special tokens, which stay where they are and replace no others.
    """

    def __init__(self, samples: Samples, kinds: Sequence[str], seed: int, fixed: Collection[int] = ()):
        self.samples, self.seed = samples, seed
        self.kinds = [CORRUPTIONS[kind] for kind in kinds]
        self.fixed = np.array(sorted(fixed), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices) -> dict[str, Tensor]:
        """The samples' batch, with `corrupted_ids` and `documents`, int64 [B, S].

        `documents` is the number of a token's document, -1 for padding and for documents that could not be changed.
        """
        found = self.samples.batch(indices)
        ids = found["input_ids"].numpy()
        owner = document_numbers(found).numpy()
        corrupted = ids.copy()
        rows = len(ids) // len(indices)  # of a sample: more than one where samples are whole batches
        numbers = np.full_like(owner, -1)
        count = 0
        for row in range(len(ids)):
            for document in np.unique(owner[row][owner[row] >= 0]):
                inside = np.flatnonzero(owner[row] == document)
                movable = inside[~np.isin(ids[row, inside], self.fixed)]
                if len(movable) > 1:
                    key = [self.seed, int(indices[row // rows]), row % rows, int(inside[0])]
                    random = np.random.default_rng(key)
                    change = self.kinds[int(random.integers(len(self.kinds)))]
                    corrupted[row, movable] = change(ids[row, movable], self._other(random), random)
                if (corrupted[row] != ids[row])[inside].any():
                    numbers[row, inside] = count
                    count += 1
        return found | {"corrupted_ids": torch.from_numpy(corrupted), "documents": torch.from_numpy(numbers)}

    def _other(self, random: np.random.Generator) -> np.ndarray:
        """Tokens of a random sample."""
        batch = self.samples.batch([int(random.integers(len(self.samples)))])
        ids = batch["input_ids"].numpy()[document_numbers(batch).numpy() >= 0]
        usable = ids[~np.isin(ids, self.fixed)]
        return usable if len(usable) else ids


def document_numbers(batch: dict[str, Tensor]) -> Tensor:
    """Index of each token's document in its row, from 0, -1 for padding: int64 [B, S]."""
    ids = batch["input_ids"]
    if "position_ids" in batch:
        starts = batch["position_ids"].expand_as(ids) == 0
        starts[:, 0] = True
        numbers = starts.long().cumsum(-1) - 1
    else:
        numbers = torch.zeros_like(ids)
    mask = batch.get("attention_mask", batch.get("token_mask"))
    return numbers if mask is None else numbers.masked_fill(~mask.bool(), -1)
