"""launch/train.py as users start it: three launchers, one line per mistake, a disk that fills up."""

import os
import resource
import signal
import socket
import subprocess
import sys

import pytest
from jobs import PATIENCE, ROOT, environment, launch, start, until

from ds_llm.checkpoint import folder as checkpoint
from ds_llm.config import run as config
from ds_llm.errors import UserError
from ds_llm.tracking import metrics_file as metrics
from ds_llm.train import trainer


def steps(output) -> list[dict]:
    return [r for r in metrics.read(output / "metrics.jsonl") if r["kind"] == "step"]


def test_every_launcher_trains_the_same(tiny, tmp_path):
    """One process with 4 accumulation steps, two with 2: the same batches, losses and gradient norms."""
    jobs = {}
    for launcher, accumulation in (("forked-1", 4), ("deepspeed", 2), ("torchrun", 2)):
        more = [f"train.accumulation_steps={accumulation}", "train.max_steps=6", "model.use_moe=true"]
        jobs[launcher] = start(launcher, [*tiny, *more, f"output={tmp_path / launcher}"])
    for launcher, job in jobs.items():
        out, err = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, f"{launcher}\n{out}\n{err}"
        assert err.strip() == "", err  # nobody's warnings
        assert "built successfully" not in out
        assert out.count("Summary") == 1  # one rank speaks
    expected = steps(tmp_path / "forked-1")
    assert len(expected) == 6
    for launcher in ("deepspeed", "torchrun"):
        for one, other in zip(expected, steps(tmp_path / launcher), strict=True):
            assert other["tokens"] == one["tokens"]
            for name in ("loss", "grad_norm", "aux_loss", "lr"):
                assert other[name] == pytest.approx(one[name], rel=2e-4), (launcher, name)


def test_mistakes_end_all_ranks_with_one_line(tiny, corpus, tmp_path):
    """A wrong key under deepspeed, one of DeepSpeed's, a missing file, a port in use."""
    wrong = start("deepspeed", [*tiny, "optim.lrr=1", f"output={tmp_path / 'a'}"])
    misspelt = start("forked-1", [*tiny, "deepspeed.zero_optimzation.stage=3", f"output={tmp_path / 'c'}"])
    _, err = misspelt.communicate(timeout=PATIENCE)
    assert misspelt.returncode == 2
    assert "zero_optimzation: DeepSpeed has no such key; did you mean 'zero_optimization'?" in err
    assert "Traceback" not in err
    _, err = wrong.communicate(timeout=PATIENCE)
    assert wrong.returncode == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (
        lines == ["error: command line: unknown key 'optim.lrr'; did you mean 'optim.lr'?"] and "Traceback" not in err
    )
    for _ in range(4):  # whichever rank finds it first; the launcher ends rank 0 as soon as the other one has ended
        missing = launch("forked", [*tiny, "data.train=nowhere.bin", f"output={tmp_path / 'b'}"])
        assert missing.returncode != 0
        lines = [line for line in missing.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "nowhere.bin: no such token file" in lines[0], missing.stderr
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        address = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        found = subprocess.run(
            [sys.executable, str(ROOT / "launch" / "train.py"), *tiny, f"output={tmp_path / 'c'}"],
            env=environment(**address),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert found.returncode == 1
    assert found.stderr.startswith(f"error: port {port}: another job") and found.stderr.count("\n") == 1


def test_two_runs_on_one_folder(tiny, tmp_path):
    output = tmp_path / "run"
    first = start("forked-1", [*tiny, "train.max_steps=100000", f"output={output}"])
    try:
        until((output / "metrics.jsonl").exists, first)
        before = (output / "config.yaml").read_bytes()
        second = launch("forked-1", [*tiny, "train.max_steps=5", f"output={output}"])
        assert second.returncode == 1 and first.poll() is None
        assert second.stderr == f"error: output: {output}: another run is writing there; {second.stderr.split('; ')[1]}"
        assert (output / "config.yaml").read_bytes() == before
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()


def test_a_disk_that_fills_up_while_saving(tiny, tmp_path, capsys):
    """A limit on the file size stands for it: the write itself fails. The earlier checkpoint stays, and continues."""
    output = tmp_path / "run"
    arguments = [*tiny, "checkpoint.every_steps=2", f"output={output}"]
    assert trainer.train(config.load(None, [*arguments, "train.max_steps=2"])) == 0
    biggest = max(p.stat().st_size for p in output.rglob("checkpoints/**/*") if p.is_file())
    limit = biggest // 2
    full = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), *arguments, "train.max_steps=4"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert full.returncode == 1, full.stdout + full.stderr
    errors = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in full.stderr, full.stderr
    assert "step-00000004: not saved: " in errors[0] and "the newest checkpoint is" in errors[0]
    assert checkpoint.steps(output) == [2]
    capsys.readouterr()
    assert trainer.train(config.load(None, [*arguments, "train.max_steps=4"])) == 0
    assert "continuing from" in capsys.readouterr().out
    assert checkpoint.steps(output) == [4, 2]
    assert [r["step"] for r in steps(output)] == [1, 2, 3, 4]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_too_small_is_noticed_before_the_first_step(tiny, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        arguments = [*tiny, "train.max_steps=2", f"output={small / 'run'}"]
        with pytest.raises(UserError, match=r"run: not enough space for a checkpoint: it needs about .* the disk has"):
            trainer.train(config.load(None, arguments))
        assert not (small / "run" / "metrics.jsonl").exists()
        never = [f"checkpoint.{name}=false" for name in ("last", "best", "every_epoch")]
        assert trainer.train(config.load(None, [*arguments, *never, "checkpoint.every_steps=0"])) == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_disk_that_others_fill_is_noticed_before_writing(tiny, tmp_path, monkeypatch):
    free = iter([10**12, 1000])
    monkeypatch.setattr(checkpoint, "_free_bytes", lambda output: next(free))
    with pytest.raises(UserError, match=r"step-00000002: not saved: it needs .* the disk has 1.0 kB; there is no"):
        trainer.train(config.load(None, [*tiny, "train.max_steps=2", f"output={tmp_path / 'run'}"]))
    assert not checkpoint.steps(tmp_path / "run")


def test_print_config_is_a_configuration(tiny, tmp_path):
    shown = launch("forked-1", [*tiny, "--print-config"])
    assert shown.returncode == 0
    (tmp_path / "shown.yaml").write_text(shown.stdout)
    again = launch("forked-1", ["--config", str(tmp_path / "shown.yaml"), "--print-config"])
    assert again.stdout == shown.stdout and "dim: 32" in shown.stdout
