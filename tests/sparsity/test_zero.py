"""Compact training under every ZeRO stage, also with states on the CPU, on one and two processes, is masked dense
training, and holds only what is kept."""

import json
from pathlib import Path

import pytest
from jobs import PATIENCE, ROOT, start

WORKER = Path(__file__).with_name("engine_worker.py")
OFFLOADED = [str(ROOT / "ds_configs" / f"zero{stage}_offload.json") for stage in (2, 3)]
CASES = [*(f"zero{stage}" for stage in range(4)), *OFFLOADED]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What both jobs report, by world size and stage."""
    folder = tmp_path_factory.mktemp("sparse")
    jobs = {
        world: start(launcher, [str(folder / f"{world}.json"), str(folder / f"state{world}"), *OFFLOADED], WORKER)
        for world, launcher in ((2, "forked"), (1, "forked-1"))
    }
    for job in jobs.values():
        out, err = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, out[-3000:] + err[-3000:]
    return {world: json.loads((folder / f"{world}.json").read_text()) for world in jobs}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", CASES, ids=lambda name: Path(name).stem)
def test_training_is_masked_dense_training_and_resumes_bitwise(found, world, name):
    case = found[world][name]
    assert "error" not in case, case["error"]
    assert case["loss_error"] < 1e-6 and case["norm_error"] < 1e-5
    assert case["weight_error"] < 1e-5 and case["average_error"] < 1e-5
    assert case["zeros"] and case["resumed_bitwise"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", CASES, ids=lambda name: Path(name).stem)
def test_every_state_has_the_size_of_the_kept_weights(found, world, name):
    case = found[world][name]
    assert case["trained"] < 0.4 * case["dense"]
    copies = world if name == "zero0" else 1  # ZeRO shards the states, without it every process has all
    padding = 32
    masters, average, moments = case["held"]
    assert case["trained"] * copies <= masters <= case["trained"] * copies + padding
    assert average == masters and moments == 2 * masters
