"""Experts, rows and layers that ranks share train like plain torch, resume to the bit and come back whole."""

import functools
import json
from pathlib import Path

import forked
import pytest
from devices import in_fp16_jobs
from jobs import PATIENCE, environment

WORKER = Path(__file__).with_name("parallel_worker.py")
# of losses (absolute), gradient norms (relative) and weights (absolute) against plain torch in fp32
TOLERANCE = {"fp32": (2e-6, 2e-4, 5e-5), "bf16": (3e-2, 0.1, 2e-2), "fp16": (5e-3, 0.1, 8e-3)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """found(processes): what a job of so many reports, by case; it is run once."""

    @functools.cache
    def report(processes: int) -> dict:
        folder = tmp_path_factory.mktemp("parallel")
        job = forked.Job(processes, [str(WORKER), str(folder / "found.json"), str(folder / "state")], environment())
        out, err = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, out[-3000:] + err[-3000:]
        return json.loads((folder / "found.json").read_text())

    return report


@pytest.mark.parametrize(
    "processes, dtype", [(2, "fp32"), (2, "bf16"), pytest.param(2, "fp16", marks=in_fp16_jobs), (4, "fp32")]
)
def test_every_case_is_as_plain_torch(found, processes, dtype):
    reports = found(processes).items()
    cases = {name: case for name, case in reports if dtype == next((d for d in TOLERANCE if d in name), "fp32")}
    assert cases
    (loss, norm, weight), wrong = TOLERANCE[dtype], []
    for name, case in cases.items():
        if "error" in case:
            wrong.append(f"{name}: {case['error']}")
            continue
        limits = {"loss_error": loss, "norm_error": norm, "weight_error": weight, "evaluation_error": 10 * loss}
        wrong += [f"{name}: {what} {case[what]}" for what, limit in limits.items() if not case[what] < limit]
        if not case.get("resumed_bitwise", True) or case["names_differ"]:
            wrong.append(f"{name}: {case}")
    assert not wrong, "\n".join(wrong)
