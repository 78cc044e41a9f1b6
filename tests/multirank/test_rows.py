"""Rows shared between two ranks give the losses and gradients of whole rows, in every family that can share them."""

import json
from pathlib import Path

import pytest
from jobs import PATIENCE, start

from ds_llm.parallel.sequence import MODEL_TYPES

WORKER = Path(__file__).with_name("rows_worker.py")


@pytest.mark.slow
def test_every_family_computes_on_shared_rows_as_on_whole_ones(tmp_path):
    path = tmp_path / "differences.json"
    job = start("forked", [str(path)], WORKER)
    out, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, out[-3000:] + err[-3000:]
    found = json.loads(path.read_text())
    assert found.keys() == set(MODEL_TYPES) - {"ds_llm_decoder"}  # that one: test_parallel.py
    limits = {"loss": 2e-5, "aux": 1e-5, "gradient": 2e-3}
    assert not {name: case for name, case in found.items() if any(case[key] > limits[key] for key in limits)}
