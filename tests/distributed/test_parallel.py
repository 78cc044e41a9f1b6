"""Experts, rows and layers that ranks share train like plain torch, resume to the bit and come back whole."""

import json
from pathlib import Path

import forked
import pytest
from jobs import environment

WORKER = Path(__file__).with_name("parallel_worker.py")
# of losses (absolute), gradient norms (relative) and weights (absolute) against plain torch in fp32
TOLERANCE = {"fp32": (2e-6, 2e-4, 5e-5), "bf16": (3e-2, 0.1, 2e-2), "fp16": (5e-3, 0.1, 8e-3)}


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory) -> dict:
    """What a job of so many processes reports, by case."""
    folder = tmp_path_factory.mktemp("parallel")
    job = forked.Job(request.param, [str(WORKER), str(folder / "found.json"), str(folder / "state")], environment())
    out, err = job.communicate(timeout=400)
    assert job.returncode == 0, out[-3000:] + err[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_every_case_is_as_plain_torch(found):
    wrong = []
    for name, case in found.items():
        if "error" in case:
            wrong.append(f"{name}: {case['error']}")
            continue
        dtype = next((d for d in TOLERANCE if f"dtype={d}" in name), "fp32")
        loss, norm, weight = TOLERANCE[dtype]
        limits = {"loss_error": loss, "norm_error": norm, "weight_error": weight, "evaluation_error": 10 * loss}
        wrong += [f"{name}: {what} {case[what]}" for what, limit in limits.items() if not case[what] < limit]
        if not case.get("resumed_bitwise", True) or case["names_differ"]:
            wrong.append(f"{name}: {case}")
    assert not wrong, "\n".join(wrong)
