"""`deepspeed --hostfile` on two machines: training and scoring as on one, with folders shared and not shared, and a
machine that is cut off or loses its power."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from jobs import ROOT, launch

from ds_llm import metrics

TRAIN, SCORE = ROOT / "launch" / "train.py", ROOT / "launch" / "score.py"
LOST = 6  # seconds, of the jobs here


def end(job: subprocess.Popen, timeout: float = 400) -> tuple[str, str]:
    try:
        return job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        pytest.fail("\n".join(job.communicate()))


def spoken(text: str) -> list[str]:
    """Error lines, without the name of the host that pdsh puts before them."""
    return [line.partition(": ")[2] for line in text.splitlines() if re.match(r"\w+: error: ", line)]


def steps(output: Path) -> list[dict]:
    return metrics.deterministic([r for r in metrics.read(output / "metrics.jsonl") if r["kind"] == "step"])


def wait_for(condition, job: subprocess.Popen, timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if job.poll() is not None or time.monotonic() > deadline:
            pytest.fail("\n".join(end(job, 1)))
        time.sleep(0.05)


@pytest.fixture(scope="module")
def own(cluster):
    """The folder of a host that stands for a path."""
    return lambda host, path: host.folder / "own" / Path(path).relative_to("/")


def test_training_on_two_hosts_in_a_shared_folder_is_that_on_one(cluster, tiny, tmp_path):
    arguments = [*tiny, "train.max_steps=4", "checkpoint.every_steps=2", "zero=1", "train.dtype=bf16"]
    job = cluster.launch(TRAIN, [*arguments, f"output={cluster.shared / 'shared'}"], tmp_path / "here")
    one = launch("forked", [*arguments, f"output={tmp_path / 'one'}"])
    out, err = end(job)
    assert job.returncode == 0, out + err
    assert one.returncode == 0, one.stderr
    assert steps(cluster.shared / "shared") == steps(tmp_path / "one") and len(steps(tmp_path / "one")) == 4
    assert out.count("Summary") == 1 and not spoken(err)
    last = Path("checkpoints/step-00000004")
    names = [
        sorted(p.relative_to(o / last) for p in (o / last).rglob("*"))
        for o in (cluster.shared / "shared", tmp_path / "one")
    ]
    assert names[0] == names[1]
    weights = last / "model" / "model.safetensors"
    assert (cluster.shared / "shared" / weights).read_bytes() == (tmp_path / "one" / weights).read_bytes()


def test_a_host_that_is_cut_off_ends_the_job_and_a_restart_goes_on(cluster, own, tiny, tmp_path):
    """In a folder that is another one on each host."""
    red, blue = cluster.hosts
    output = cluster.apart / "run"
    limits = [f"stability.lost_timeout={LOST}", "checkpoint.every_steps=4", "checkpoint.keep=2", "model.dropout=0.1"]
    arguments = [*tiny, *limits, "zero=2", "eval.before=false", "data.val=[]", "train.max_steps=18"]
    one = launch("forked", [*arguments, f"output={tmp_path / 'one'}"])
    assert one.returncode == 0, one.stderr
    slow = tmp_path / "slow.py"  # so that there is time to pull a cable
    slow.write_text(
        "import time; from ds_llm import trainer; step = trainer.Trainer._step\n"
        "trainer.Trainer._step = lambda self: (time.sleep(0.3), step(self))\n"
    )
    job = cluster.launch(TRAIN, [*arguments, f"output={output}"], tmp_path / "here", DS_LLM_EXTENSIONS=slow)
    on_red, on_blue = (own(host, output) for host in (red, blue))
    wait_for(lambda: len(steps(on_red)) >= 9, job)
    blue.cut()
    began = time.monotonic()
    try:
        assert cluster.free(LOST + 30), [p.cmdline() for host in cluster.hosts for p in host.processes()]
        out, err = end(job, 30)
    finally:
        blue.mend()
    assert time.monotonic() - began < LOST + 40 and job.returncode != 0
    (line,) = spoken(err)
    assert re.match(
        rf"error: rank 1 \(blue, process \d+\) gave no sign of life for {LOST} s .*last seen in (a )?step", line
    ), err
    held = [{p.name for p in folder.glob("checkpoints/step-*")} for folder in (on_red, on_blue)]
    assert held[0] == held[1] == {"step-00000004", "step-00000008"}
    files = [
        {p.name for p in folder.rglob("checkpoints/step-00000008/**/*optim_states.pt")} for folder in (on_red, on_blue)
    ]
    assert len(files[0]) == len(files[1]) == 1 and files[0] != files[1]

    job = cluster.launch(TRAIN, [*arguments, f"output={output}"], tmp_path / "here")
    out, err = end(job)
    assert job.returncode == 0, out + err
    assert f"continuing from {output}/checkpoints/step-00000008" in out
    assert steps(on_red) == steps(tmp_path / "one") and len(steps(on_red)) == 18
    assert (on_red / "model").is_dir() and not (on_blue / "model").exists()
    weights = "model/model.safetensors"
    assert (on_red / weights).read_bytes() == (tmp_path / "one" / weights).read_bytes()


def test_scores_of_two_hosts_have_the_bytes_of_one_also_after_one_lost_its_power(cluster, own, chats, tmp_path):
    import json
    import random

    from chats import WORDS

    red, blue = cluster.hosts
    rows = [{"text": " ".join(random.choices(WORDS, k=random.randint(1, 30)))} for _ in range(400)]
    data = cluster.shared / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = cluster.shared / "model"
    shutil.copytree(chats / "llama", model, dirs_exist_ok=True)
    arguments = ["--model", str(model), "--data", str(data), "--metric", "entropy", "ifd", "score.tokens_per_batch=64"]
    arguments += ["score.report=false", f"score.lost_timeout={LOST}"]
    alone = launch("forked-1", [*arguments, "--out", str(tmp_path / "alone.jsonl")], script=SCORE)
    assert alone.returncode == 0, alone.stderr
    out = cluster.apart / "scores.jsonl"
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time; from ds_llm.scoring.forward import Scorer; score = Scorer.score\n"
        "Scorer.score = lambda *given: (time.sleep(0.1), score(*given))[1]\n"
    )
    job = cluster.launch(SCORE, [*arguments, "--out", str(out)], tmp_path / "here", DS_LLM_EXTENSIONS=slow)
    parts = own(red, f"{out}.d/parts")
    wait_for(lambda: sum(p.stat().st_size > 4000 for p in parts.glob("part-0001-*.bin")) == 2, job)
    blue.kill()
    said, err = end(job)
    assert job.returncode != 0 and cluster.free(10), said + err
    (line,) = spoken(err)
    assert re.match(r"error: rank 1 \(blue, process \d+\) .*run the same command again", line), err
    done = sum(p.stat().st_size for p in parts.iterdir())
    blue.mend()
    blue.start()
    job = cluster.launch(SCORE, [*arguments, "--out", str(out)], tmp_path / "here")
    said, err = end(job)
    assert job.returncode == 0, said + err
    assert "of them done before" in said and done > 8000
    assert own(red, out).read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert list(own(blue, cluster.apart).glob("scores*")) == []  # what it had been given is gone
