"""Corrupted copies: each kind does what it says, to documents alone, whatever the batch."""

import numpy as np
import pytest
import torch

from ds_llm.data.corrupt import CORRUPTIONS, CorruptedPairs, document_numbers
from ds_llm.data.packing import PackedSamples

FIXED, PAD = 1, 0


class Documents:
    """Documents of random tokens from 10 on; each begins with token 1."""

    def __init__(self, lengths: list[int]):
        random = np.random.default_rng()
        self.lengths = np.array(lengths)
        self.ids = [np.concatenate([[FIXED], random.integers(10, 1000, n - 1)]) for n in lengths]

    def example(self, index: int):
        return self.ids[index], np.append(self.ids[index][1:], -100)


@pytest.fixture
def packed() -> PackedSamples:
    return PackedSamples(Documents([9, 40, 2, 30, 17, 25, 33, 12, 1, 21]), 48, PAD)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_copies_are_of_the_documents_alone(packed, kind):
    batch = CorruptedPairs(packed, [kind], 3, [FIXED]).batch(range(len(packed)))
    ids, copies, documents = (batch[name] for name in ("input_ids", "corrupted_ids", "documents"))
    assert documents.max() + 1 == len(documents[documents >= 0].unique()) >= 6
    known = {int(i) for document in packed.documents.ids for i in document}
    assert torch.equal(copies == FIXED, ids == FIXED) and torch.equal(copies[documents < 0], ids[documents < 0])
    for number in range(int(documents.max()) + 1):
        inside = documents == number
        before, after = ids[inside][1:], copies[inside][1:]
        share = (before != after).float().mean()
        assert share > 0
        if kind == "shuffle":
            assert torch.equal(before.sort().values, after.sort().values)
        elif kind == "repeat":
            period = next(p for p in range(1, len(after) + 1) if torch.equal(after[p:], after[:-p]))
            assert period < 16 and set(after.tolist()) <= set(before.tolist())
        else:
            assert set(after.tolist()) <= known
    padding = document_numbers(batch) < 0
    assert (documents[padding] == -1).all() and (padding == (ids == PAD)).all()


def test_a_copy_depends_on_its_sample_alone(packed):
    pairs = CorruptedPairs(packed, list(CORRUPTIONS), 3, [FIXED])
    order = list(range(len(packed)))[::-1]
    together = pairs.batch(order)
    for row, index in enumerate(order):
        alone = pairs.batch([index])
        length = alone["corrupted_ids"].shape[1]
        assert torch.equal(together["corrupted_ids"][row, :length], alone["corrupted_ids"][0])
    other = CorruptedPairs(packed, list(CORRUPTIONS), 4, [FIXED]).batch(order)
    assert not torch.equal(other["corrupted_ids"], together["corrupted_ids"])
