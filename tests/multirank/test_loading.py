"""Ranks that read their parts of a model alone train the very model that ranks which load it whole train."""

import functools
import json
from pathlib import Path

import forked
import pytest
from jobs import PATIENCE, environment

WORKER = Path(__file__).with_name("loading_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """found(processes): what a job of so many reports, by case; it is run once."""

    @functools.cache
    def report(processes: int) -> dict:
        folder = tmp_path_factory.mktemp("loading")
        job = forked.Job(processes, [str(WORKER), str(folder / "found.json"), str(folder / "models")], environment())
        out, err = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, out[-3000:] + err[-3000:]
        return json.loads((folder / "found.json").read_text())

    return report


@pytest.mark.parametrize("processes", [2, 3])  # 3: weights that the ranks cannot share equally
def test_every_bit_of_the_first_steps_is_that_of_whole_models(found, processes):
    cases = {name: case for name, case in found(processes).items() if "zero=" in name}
    wrong = {n: case for n, case in cases.items() if not (case.get("same_weights") and case.get("same_losses"))}
    assert not wrong, "\n".join(f"{name}: {case.get('error', case)}" for name, case in wrong.items())
    assert len(cases) > (15 if processes == 2 else 5)


@pytest.mark.parametrize("processes", [2, 3])
def test_ranks_of_zero_3_read_the_files_about_once_together(found, processes):
    for name, case in found(processes).items():
        if "zero=3" in name and "scratch" not in name and "expert" not in name:
            assert sum(case["read"]) <= 1.2 * case["size"], name
            assert max(case["read"]) <= 1.3 * case["size"] / processes, name


@pytest.mark.parametrize("processes", [2, 3])
def test_a_frozen_model_is_read_in_parts_too(found, processes):
    assert found(processes)["frozen"]["same"]
    first, second = found(processes)["frozen"]["fingerprints"]
    assert first == second


@pytest.mark.parametrize("processes", [2, 3])
def test_models_that_ranks_write_together_are_those_that_transformers_writes(found, processes):
    for kind, case in found(processes)["saved"].items():
        assert case["same"] and case["loads"] and case["configuration"], kind
        assert len([name for name in case["files"] if name.startswith("model-")]) > 2, kind
        assert case["held"] < 0.6, kind  # no rank ever held the whole model
        assert not [name for name in case["files"] if name.startswith(".")], kind


def test_what_is_written_does_not_depend_on_the_number_of_ranks(found):
    for kind, case in found(2)["saved"].items():
        assert case["files"] == found(3)["saved"][kind]["files"], kind


def test_every_architecture_is_written_as_transformers_writes_it(found):
    wrong = {name: problem for name, problem in found(2)["written"].items() if problem}
    assert len(found(2)["written"]) > 80 and not wrong, wrong
