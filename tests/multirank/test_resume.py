"""A run killed in mid-epoch and continued ends bit for bit like the run that was not."""

import json
import signal
import subprocess
from pathlib import Path

import psutil
import torch
from jobs import PATIENCE, hold, launch, start, until

from ds_llm.tracking import metrics_file as metrics

STEPS, EVERY = 24, 5
HARD = [  # everything that has a state: dropout, averages, experts, accumulation, an epoch that ends in mid-step
    f"train.max_steps={STEPS}",
    f"checkpoint.every_steps={EVERY}",
    "checkpoint.keep=0",
    "train.batch_size=3",
    "train.accumulation_steps=2",
    "model.dropout=0.2",
    "model.use_moe=true",
    "model.n_routed_experts=4",
    "ema.enabled=true",
    "eval.every_steps=10",
    "stability.spike_factor=5",
    "stability.spike_window=4",
]


def tensors(value, prefix="") -> dict:
    """All tensors and numbers in a nested state, by path."""
    if torch.is_tensor(value):
        return {prefix: value}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif isinstance(value, (int, float, bool)):
        return {prefix: torch.tensor(value)}
    else:
        return {}
    return {k: v for name, child in items for k, v in tensors(child, f"{prefix}/{name}").items()}


def same_state(one: Path, other: Path) -> None:
    """All files of two checkpoints hold the same numbers."""
    files = sorted(str(p.relative_to(one)) for p in one.rglob("*") if p.is_file())
    assert files == sorted(str(p.relative_to(other)) for p in other.rglob("*") if p.is_file())
    assert any("optim_states" in name for name in files) and any("ema_rank" in name for name in files)
    for name in files:
        if name.endswith(".pt"):
            a, b = (tensors(torch.load(p / name, weights_only=False, map_location="cpu")) for p in (one, other))
            assert a.keys() == b.keys() and a, name
            for key in a:
                assert torch.equal(a[key].cpu(), b[key].cpu()), f"{name}: {key}"
        elif name.endswith(".safetensors"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    states = [json.loads((p / "trainer.json").read_text()) for p in (one, other)]
    for state in states:
        state["config"].pop("output")
    assert states[0] == states[1]


def wait_for_step(output: Path, step: int, job: subprocess.Popen) -> None:
    """Until the metrics hold `step`."""
    figures = output / "metrics.jsonl"
    until(lambda: any(r["kind"] == "step" and r["step"] >= step for r in metrics.read(figures)), job)


def kill_one_rank(job: subprocess.Popen) -> tuple[str, str]:
    """Kill rank 1; the job must end by itself. Returns its output."""
    ranks = [p for p in psutil.Process(job.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    ranks[0].kill()
    return job.communicate(timeout=PATIENCE)


def same_metrics(one: Path, other: Path) -> None:
    expected, found = (metrics.deterministic(metrics.read(p / "metrics.jsonl")) for p in (one, other))
    steps = [r["step"] for r in found if r["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    assert found == expected


def test_killed_and_resumed_is_bitwise_the_same(tiny, tmp_path):
    arguments = [*tiny, *HARD, "zero=2", "train.dtype=bf16"]
    whole = launch("forked", [*arguments, f"output={tmp_path / 'whole'}"])
    assert whole.returncode == 0, whole.stdout + whole.stderr
    output = tmp_path / "killed"
    job = start("deepspeed", [*arguments, f"output={output}"], **hold(tmp_path, "step", STEPS - 2))
    wait_for_step(output, 2 * EVERY + 2, job)
    _, err = kill_one_rank(job)
    assert job.returncode != 0 and "Traceback" not in err
    newest = max(output.glob("checkpoints/step-*"))
    victim = next(newest.glob("deepspeed/*optim_states.pt"))
    damaged = bytearray(victim.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # one bit, the size stays
    victim.write_bytes(damaged)
    (output / "checkpoints" / ".step-00000099.partial").mkdir()  # what a kill while saving leaves
    resumed = launch("forked", [*arguments, f"output={output}", "--resume", "auto"])
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"{newest} is damaged (deepspeed/{victim.name} has other content" in resumed.stdout
    last = f"checkpoints/step-{STEPS:08d}"
    same_metrics(tmp_path / "whole", output)
    same_state(tmp_path / "whole" / last, output / last)
    assert not list(output.glob("checkpoints/.step-*"))


def test_interrupted_by_sigterm_saves_and_continues(tiny, tmp_path):
    arguments = [*tiny, *HARD, "zero=3", "checkpoint.every_steps=0", "checkpoint.every_epoch=false"]
    whole = launch("forked", [*arguments, f"output={tmp_path / 'whole'}"])
    assert whole.returncode == 0, whole.stdout + whole.stderr
    output = tmp_path / "stopped"
    job = start("torchrun", [*arguments, f"output={output}"], **hold(tmp_path, "step", STEPS - 2))
    wait_for_step(output, 4, job)
    job.send_signal(signal.SIGTERM)  # torchrun passes it on to its processes
    out, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode != 0
    saved = max(output.glob("checkpoints/step-*"))
    assert "stopped by SIGTERM after step" in out and str(saved) in out
    assert int(saved.name[5:]) < STEPS
    resumed = launch("forked", [*arguments, f"output={output}"])
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"continuing from {saved}" in resumed.stdout
    same_metrics(tmp_path / "whole", output)
    last = f"checkpoints/step-{STEPS:08d}"
    same_state(tmp_path / "whole" / last, output / last)
