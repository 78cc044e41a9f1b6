"""Compact training under every ZeRO stage, on one and two processes, is masked dense training, and holds only what is
kept."""

import json
from pathlib import Path

import pytest
from jobs import start

WORKER = Path(__file__).with_name("engine_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What both jobs report, by world size and stage."""
    folder = tmp_path_factory.mktemp("sparse")
    jobs = {
        world: start(launcher, [str(folder / f"{world}.json"), str(folder / f"state{world}")], WORKER)
        for world, launcher in ((2, "forked"), (1, "python"))
    }
    for job in jobs.values():
        out, err = job.communicate(timeout=400)
        assert job.returncode == 0, out[-3000:] + err[-3000:]
    return {world: json.loads((folder / f"{world}.json").read_text()) for world in jobs}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_training_is_masked_dense_training_and_resumes_bitwise(found, world, stage):
    case = found[world][f"zero{stage}"]
    assert "error" not in case, case["error"]
    assert case["loss_error"] < 1e-6 and case["norm_error"] < 1e-5
    assert case["weight_error"] < 1e-5 and case["average_error"] < 1e-5
    assert case["zeros"] and case["resumed_bitwise"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_every_state_has_the_size_of_the_kept_weights(found, world, stage):
    case = found[world][f"zero{stage}"]
    assert case["trained"] < 0.4 * case["dense"]
    copies = 1 if stage else world  # ZeRO shards the states, without it every process has all
    padding = 32
    masters, average, moments = case["held"]
    assert case["trained"] * copies <= masters <= case["trained"] * copies + padding
    assert average == masters and moments == 2 * masters
