"""Gradients are right for modules and weights that a step uses more than once, at every ZeRO stage and its settings.

DeepSpeed has lost some of them: https://github.com/deepspeedai/DeepSpeed/issues/7718 (0.17.6 to 0.18.2),
https://github.com/deepspeedai/DeepSpeed/issues/8224 (bf16 under ZeRO-2, still in 0.19.3), and up to 0.19.7 all of other
ranks' on a CPU with `contiguous_gradients: false`.
"""

import json
from pathlib import Path

import pytest
from jobs import PATIENCE, start

WORKER = Path(__file__).with_name("reused_worker.py")
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}  # five products one after the other; bf16 has 8 bits


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict:
    """Largest relative error of a gradient, by dtype, stage and setting."""
    path = tmp_path_factory.mktemp("reused") / "errors.json"
    job = start("forked", [str(path)], WORKER)
    out, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, out[-3000:] + err[-3000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_of_reused_modules(errors, dtype):
    own = {name: error for name, error in errors.items() if name.startswith(dtype)}
    assert len(own) == 3 * 6
    assert not {name: error for name, error in own.items() if error > TOLERANCE[dtype]}
