"""A run that an earlier layout of the code saved continues, to the same weights.

`run_of_november.tar.gz` holds a run of commit 8ec8337, killed by SIGKILL after step 2 of 4 (our decoder with experts,
ZeRO-2 on two processes, moving average), its data, and the weights and metrics of the same run that was not killed.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from jobs import launch
from safetensors.torch import load_file

from ds_llm.tracking import metrics_file

ARCHIVE = Path(__file__).with_name("run_of_november.tar.gz")


@pytest.mark.parametrize("launcher, tolerance", [("forked", 1e-6), ("forked-1", 1e-4)])
def test_continues(launcher, tolerance, tmp_path, monkeypatch):
    """On as many processes as saved it, and elastically on one."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    keys = json.loads(Path("keys.json").read_text())
    if launcher == "forked-1":
        keys += ["train.accumulation_steps=2"]
    job = launch(launcher, [*keys, "output=run"])
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-3000:]
    starts = [r["step"] for r in metrics_file.read(Path("run/metrics.jsonl")) if r.get("event") == "start"]
    assert starts == [0, 2]  # it went on; it did not begin anew
    found, expected = (
        {r["step"]: r["loss"] for r in metrics_file.read(Path(name)) if r["kind"] == "step"}
        for name in ("run/metrics.jsonl", "expected_metrics.jsonl")
    )
    assert list(found) == list(expected) == [1, 2, 3, 4]
    assert found == pytest.approx(expected, rel=tolerance)
    weights, others = load_file("run/model/model.safetensors"), load_file("expected_model.safetensors")
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=tolerance)
