"""Packed documents under ZeRO, where one rank has six of them and the other one, as in plain torch alone."""

import json
from pathlib import Path

from jobs import PATIENCE, start

WORKER = Path(__file__).with_name("isolation_worker.py")


def test_ranks_with_different_documents_train_as_plain_torch(tmp_path):
    path = tmp_path / "errors.json"
    job = start("forked", [str(path)], WORKER)
    out, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, out[-3000:] + err[-3000:]
    found = json.loads(path.read_text())
    assert len(found) == 4 * 3
    assert not {name: case for name, case in found.items() if case["loss_error"] > 1e-4}
    assert not {name: case for name, case in found.items() if case["weight_error"] > 0.05}
