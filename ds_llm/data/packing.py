"""Rows of equal cost from documents of unequal length: packs of whole documents, or padded groups of similar length.

Both are pure functions of the lengths, computed before the samples are ordered: a pack or a group is a sample.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ds_llm.data.order import hash64

IGNORE_INDEX = -100
BLOCK = 256  # bins that are looked through together


def first_fit_decreasing(lengths, capacity: int) -> list[list[int]]:
    """Bins of document numbers whose lengths sum to `capacity` at most; every document is in one bin.

    Documents are taken in order of decreasing length (equal ones by number), each into the first bin that has room
    (Johnson 1973: never more than 11/9 of the best possible number of bins, plus 6/9). A million documents take
    seconds: those of one length are placed together, and bins are passed over a block at a time.

    lengths: integers [n], each from 1 to `capacity`; `ValueError` otherwise.
    """
    lengths = _checked(lengths, capacity, "capacity")
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=0)).tolist()
    room = np.full((-(-len(order) // BLOCK), BLOCK), capacity)  # of every bin, at first of all that could be needed
    most = np.full(len(room), capacity)  # the largest of each block
    which = np.empty(len(order), dtype=np.int64)  # the bin of each document, in `order`
    for start, stop in pairwise([*starts, len(order)]):
        length = int(ordered[start])
        # an unopened bin is one with all its room, so the search for room ends there
        for block in np.flatnonzero(most >= length):
            # equal documents fill the first bin with room until it has none, then the next one
            fits = room[block] // length
            taken = np.clip(stop - start - (np.cumsum(fits) - fits), 0, fits)
            room[block] -= taken * length
            most[block] = room[block].max()
            placed = np.repeat(np.arange(BLOCK) + block * BLOCK, taken)
            which[start : start + len(placed)] = placed
            start += len(placed)
            if start == stop:
                break
    return _lists(order, which, int(which.max(initial=-1)) + 1)


def group_by_length(lengths, tokens: int) -> list[list[int]]:
    """Groups of document numbers of similar length: a group's size times its longest length is `tokens` at most.

    Every document is in one group. Documents of one length are shuffled, so that a group does not hold neighbours of
    the file only. lengths: integers [n], each from 1 to `tokens`; `ValueError` otherwise.
    """
    lengths = _checked(lengths, tokens, "token budget")
    order = np.lexsort((hash64(np.arange(len(lengths)), 0, 0), -lengths))
    sizes, at = [], 0
    while at < len(order):  # the first of a group is its longest
        sizes.append(min(int(tokens // lengths[order[at]]), len(order) - at))
        at += sizes[-1]
    return _lists(order, np.repeat(np.arange(len(sizes)), sizes), len(sizes))


def _checked(lengths, limit: int, what: str) -> np.ndarray:
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.ndim != 1 or (len(lengths) and (lengths.min() < 1 or lengths.max() > limit)):
        raise ValueError(f"lengths must be a list of numbers from 1 to the {what}, {limit}")
    return lengths


def _lists(items: np.ndarray, group: np.ndarray, groups: int) -> list[list[int]]:
    """`items` by group, in their order."""
    flat = items[np.argsort(group, kind="stable")].tolist()
    ends = np.cumsum(np.bincount(group, minlength=groups)).tolist()
    return [flat[i:j] for i, j in pairwise([0, *ends])]


class PackedSamples:
    """Samples that are packs of documents: rows of up to `seq_len` tokens that never cut a document.

    documents: has `lengths` and `example(i)` -> (input_ids, labels) int64 [n], labels already shifted, -100 where
    nothing is learned.
    """

    def __init__(self, documents, seq_len: int, pad_token_id: int):
        self.documents, self.seq_len, self.pad = documents, seq_len, pad_token_id
        self.packs = first_fit_decreasing(documents.lengths, seq_len)

    def __len__(self) -> int:
        return len(self.packs)

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that are not padding, if all rows had `seq_len` tokens."""
        return float(np.sum(self.documents.lengths)) / max(len(self.packs) * self.seq_len, 1)

    def batch(self, indices) -> dict[str, Tensor]:
        """`input_ids`, `labels`, `position_ids` int64 [B, S] of the packs `indices`; S is the longest of them.

        Positions restart at 0 with every document, which separates their attention. A shorter row is filled with
        another document without labels, where `token_mask` [B, S] is False; without shorter rows there is no mask.
        """
        rows = [[self.documents.example(i) for i in self.packs[index]] for index in indices]
        used = [sum(len(ids) for ids, _ in row) for row in rows]
        shape = (len(rows), max(used))
        input_ids = np.full(shape, self.pad, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        position_ids = np.zeros(shape, dtype=np.int64)
        for r, row in enumerate(rows):
            at = 0
            for ids, targets in row:
                end = at + len(ids)
                input_ids[r, at:end], labels[r, at:end], position_ids[r, at:end] = ids, targets, np.arange(end - at)
                at = end
            position_ids[r, at:] = np.arange(shape[1] - at)
        found = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        if min(used) < shape[1]:
            found["token_mask"] = np.arange(shape[1]) < np.array(used)[:, None]
        return {name: torch.from_numpy(value) for name, value in found.items()}


class GroupedSamples:
    """Samples that are whole batches: documents of similar length, padded to the longest, `tokens` at most.

    documents: as for `PackedSamples`.
    """

    def __init__(self, documents, tokens: int, pad_token_id: int):
        self.documents, self.tokens, self.pad = documents, tokens, pad_token_id
        self.groups = group_by_length(documents.lengths, tokens)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def fill(self) -> float:
        """Share of the batches' tokens that are not padding."""
        lengths = np.asarray(self.documents.lengths)
        padded = sum(len(group) * int(lengths[group[0]]) for group in self.groups)
        return float(lengths.sum()) / max(padded, 1)

    def batch(self, indices) -> dict[str, Tensor]:
        """`input_ids`, `labels`, `attention_mask` int64 [B, S] of the one group in `indices`, padded on the right."""
        (index,) = indices
        rows = [self.documents.example(i) for i in self.groups[index]]
        shape = (len(rows), max(len(ids) for ids, _ in rows))
        input_ids = np.full(shape, self.pad, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for r, (ids, targets) in enumerate(rows):
            input_ids[r, : len(ids)], labels[r, : len(ids)], mask[r, : len(ids)] = ids, targets, 1
        found = {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
        return {name: torch.from_numpy(value) for name, value in found.items()}
