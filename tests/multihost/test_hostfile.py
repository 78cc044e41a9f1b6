"""`deepspeed --hostfile` on two machines: training and scoring as on one, with folders shared and not shared, and a
machine that is cut off or loses its power."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from jobs import PATIENCE, ROOT, hold, launch, until

from ds_llm.scoring import parts
from ds_llm.tracking import metrics_file as metrics

TRAIN, SCORE = ROOT / "launch" / "train.py", ROOT / "launch" / "score.py"
LOST = 6  # seconds, of the jobs here


def end(job: subprocess.Popen) -> tuple[str, str]:
    try:
        return job.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        pytest.fail("\n".join(job.communicate()))


def spoken(text: str) -> list[str]:
    """Error lines, without the name of the host that pdsh puts before them."""
    return [line.partition(": ")[2] for line in text.splitlines() if re.match(r"\w+: error: ", line)]


def steps(output: Path) -> list[dict]:
    return metrics.deterministic([r for r in metrics.read(output / "metrics.jsonl") if r["kind"] == "step"])


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
    job = cluster.launch(TRAIN, [*arguments, f"output={output}"], tmp_path / "here", **hold(tmp_path, "step", 11))
    on_red, on_blue = (own(host, output) for host in (red, blue))
    until(lambda: len(steps(on_red)) >= 9, job)
    blue.cut()
    try:
        assert cluster.free(PATIENCE), [p.cmdline() for host in cluster.hosts for p in host.processes()]
        out, err = end(job)
    finally:
        blue.mend()
    assert job.returncode != 0
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
    job = cluster.launch(SCORE, [*arguments, "--out", str(out)], tmp_path / "here", **hold(tmp_path, "score", 40))
    folder = own(red, f"{out}.d/parts")

    def scored() -> list[int]:
        """Batches of each rank; the first record is a header."""
        return [sum(1 for _ in parts.read(path)) - 1 for path in folder.glob("part-0001-*.bin")]

    until(lambda: len(scored()) == 2 and min(scored()) >= 20, job)
    blue.kill()
    (tmp_path / "go").touch()
    said, err = end(job)
    assert job.returncode != 0 and cluster.free(PATIENCE), said + err
    (line,) = spoken(err)
    assert re.match(r"error: rank 1 \(blue, process \d+\) .* same command (again|continues)", line), err
    blue.mend()
    blue.start()
    job = cluster.launch(SCORE, [*arguments, "--out", str(out)], tmp_path / "here")
    said, err = end(job)
    assert job.returncode == 0, said + err
    assert "of them done before" in said
    assert own(red, out).read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert list(own(blue, cluster.apart).glob("scores*")) == []  # what it had been given is gone
