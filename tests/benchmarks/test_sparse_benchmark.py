"""The contestants of the sparse benchmark train the same, and their bytes are what the tensors say."""

import multiprocessing
import threading
from pathlib import Path

import pytest
import torch

from benchmarks.sparse import SHAPES, contestant, peak_bytes, peak_is_new

DENSITY, STEPS = 0.25, 3


def run(name: str) -> tuple[list[float], int, int]:
    """Losses of a few steps, bytes of the state, bytes of the masks."""
    ours, theirs = multiprocessing.Pipe()
    options = (name, SHAPES["tiny"], DENSITY, 2, 16, torch.get_num_threads(), theirs)
    thread = threading.Thread(target=contestant, args=options, daemon=True)
    thread.start()
    assert ours.recv() == "ready"
    losses = []
    for _ in range(STEPS):
        ours.send("step")
        seconds, loss = ours.recv()
        assert seconds > 0
        losses.append(loss)
    ours.send("end")
    state, masks, peak = ours.recv()
    thread.join()
    assert peak > state
    return losses, state, masks


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures memory of the CPU")
def test_contestants_train_the_same_and_hold_what_they_say():
    found = {name: run(name) for name in ("dense", "re-masked", "utils.prune", "compact", "compact frozen")}
    for name in ("utils.prune", "compact"):
        assert found[name][0] == pytest.approx(found["re-masked"][0], abs=2e-6)
    hidden, inner, layers = (SHAPES["tiny"][k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    matrices = layers * (4 * hidden**2 + 3 * hidden * inner)
    rest = SHAPES["tiny"]["vocab_size"] * hidden + (2 * layers + 1) * hidden
    counters = {name: 4 * tensors for name, tensors in (("all", 7 * layers + 1 + 2 * layers + 1), ("kept", 7 * layers))}
    kept = sum(round(DENSITY * n) for n in [hidden**2] * 4 * layers + [hidden * inner] * 3 * layers)
    for name in ("dense", "re-masked", "utils.prune"):
        assert found[name][1] == 16 * (matrices + rest) + counters["all"]
    assert found["compact"][1] == 16 * (kept + rest) + counters["all"]
    assert found["compact frozen"][1] == 16 * kept + 4 * rest + counters["kept"]
    assert found["re-masked"][2] == matrices and found["dense"][2] == 0
    assert found["utils.prune"][2] >= 4 * matrices


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a phase is measured on Linux only")
def test_the_peak_is_that_of_the_phase():
    assert peak_is_new()
    before, size = peak_bytes(), 200 << 20
    held = torch.ones(size, dtype=torch.uint8)
    assert before + 0.95 * size < peak_bytes() < before + 1.2 * size
    del held
    assert peak_bytes() > before + 0.95 * size  # it stays until it starts anew
    assert peak_is_new() and peak_bytes() < before + 0.5 * size
