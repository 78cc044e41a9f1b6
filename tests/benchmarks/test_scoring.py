"""The contestants of the scoring benchmark do the same work."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import scoring
from ds_llm.scoring.forward import Scorer

sys.path.insert(0, str(Path(__file__).parents[1] / "scoring"))
from tiny_models import VOCAB, save


def test_all_score_the_same_documents_alike(corpus, tmp_path):
    random = np.random.default_rng()
    scorer = Scorer(save("llama", tmp_path / "m", corpus / "tokenizer"), ["entropy", "logprob"], dtype="fp32")
    ids = [random.integers(4, VOCAB, n) for n in (30, 5, 17, 2, 44, 9)]
    arguments = (scorer.model, scorer.device, ids)
    batches = {
        "ours": scoring.ours(scorer, ids, 64),
        "batch 1": scoring.in_order(lambda batch: scoring.padded_batch(*arguments, batch), len(ids), 1),
        "padded": scoring.in_order(lambda batch: scoring.padded_batch(*arguments, batch), len(ids), 4),
        "floor": scoring.floor(*arguments, 64),
    }
    with torch.no_grad():
        attention = scorer.model.config._attn_implementation
        found = scoring.measure(batches, scorer.model, scorer.device.type == "cuda")
    assert scorer.model.config._attn_implementation == attention  # of the next round
    for name in ("ours", "padded"):
        assert scoring.disagreement(found["batch 1"]["scores"], found[name]["scores"]) < 1e-3
        assert sorted(found[name]["scores"]) == list(range(len(ids)))
    assert sum(unit.args[1].numel() for unit in batches["floor"]) == sum(map(len, ids))


def test_a_different_score_shows():
    assert scoring.disagreement({0: (2.0, -1.0)}, {0: (2.0, -1.01)}) == pytest.approx(0.01)
    assert scoring.disagreement({0: (2.0, -1.0)}, {0: (None, -1.0)}) == 0


def test_peak_memory_counts_what_a_block_takes():
    with scoring.PeakMemory(cuda=False) as memory:
        held = torch.ones(64 << 20, dtype=torch.uint8)
        del held
    assert memory.bytes > 48 << 20
