"""Jobs of two processes that hang: a rank in a loop while it reads data, the other in a collective; a stopped rank; a
scoring rank. Each is reported with what all ranks did and their stacks, and ended; long legitimate work is not."""

import json
import os
import re
import signal

import psutil
import pytest
from jobs import PATIENCE, ROOT, start, until

from ds_llm.tracking import metrics_file as metrics

# Extensions (see ds_llm.cli) that bring a process to the states to be found; each knows its rank from the environment
SLOW_THEN_STUCK = """
import os, time
from ds_llm.train import trainer
from ds_llm.evaluation import perplexity
reads, writes, reports = trainer.micro_batch, trainer.Trainer._write, perplexity.progress

def stuck(order, start, *rest):
    while os.environ["RANK"] == "1" and start >= 3 * STEP:
        pass
    return reads(order, start, *rest)

def slow(self, folder):
    time.sleep(5)
    writes(self, folder)

class Slow:
    def __init__(self, *given, **more):
        self.inner = reports(*given, **more)
    def __enter__(self):
        task, self.windows = self.inner.__enter__(), 0
        advance = task.advance
        def later(*given):
            self.windows += 1
            time.sleep(1.5 if self.windows <= 3 else 0)
            advance(*given)
        task.advance = later
        return task
    def __exit__(self, *error):
        return self.inner.__exit__(*error)

trainer.micro_batch, trainer.Trainer._write, perplexity.progress = stuck, slow, Slow
"""
STUCK_SCORER = """
import os, time
from ds_llm.scoring.forward import Scorer
plain, calls = Scorer.score, []

def stuck(self, samples):
    calls.append(1)
    while os.environ["RANK"] == "1" and len(calls) > 3:
        time.sleep(0.01)
    return plain(self, samples)

Scorer.score = stuck
"""


def end(job) -> tuple[str, str]:
    """The output of a job that must end by itself; nothing of it may stay."""
    ranks = psutil.Process(job.pid).children(recursive=True)
    try:
        out, err = job.communicate(timeout=PATIENCE)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert not psutil.wait_procs(ranks, timeout=PATIENCE)[1]
    return out, err


def reported(err: str) -> dict[int, str]:
    """The stacks of each rank."""
    parts = re.split(r"^rank (\d) \(\S+, process \d+\) in [^\n]*:$", err, flags=re.MULTILINE)
    return {int(rank): stack for rank, stack in zip(parts[1::2], parts[2::2], strict=True)}


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


def test_a_rank_that_hangs_is_reported_with_the_stacks_of_all_but_long_saving_and_evaluation_are_not(tiny, tmp_path):
    (tmp_path / "extension.py").write_text(SLOW_THEN_STUCK.replace("STEP", "8"))
    output = tmp_path / "run"
    arguments = [*tiny, "stability.hang_timeout=4", "checkpoint.every_steps=2", f"output={output}"]
    job = start("forked", arguments, DS_LLM_EXTENSIONS=str(tmp_path / "extension.py"))
    out, err = end(job)
    assert job.returncode == 1, out + err
    assert (output / "checkpoints" / "step-00000002").is_dir() and "best" not in err
    assert [r["step"] for r in metrics.read(output / "metrics.jsonl") if r["kind"] == "step"] == [1, 2, 3]
    assert re.search(r"^no progress within 4 s \(stability.hang_timeout\)$", err, re.MULTILINE)
    for rank in (0, 1):  # host, process, what it did and how long
        assert re.search(rf"^  rank {rank} \(\S+, process \d+\): step 4, for \d+ s$", err, re.MULTILINE), err
    stacks = reported(err)
    assert "watchdog.py" not in "".join(stacks.values())  # only what hangs
    assert "in stuck" in stacks[1] and "in _step" in stacks[1] and "all_reduce" not in stacks[1]
    assert "all_reduce" in stacks[0] and "in _step" in stacks[0]
    (line,) = errors(err)
    assert "look at the stacks" in line and "raise stability.hang_timeout" in line


@pytest.mark.parametrize("hang, lost", [("5", "900"), ("0", "5")])
def test_a_stopped_rank_ends_the_job_as_hung_or_as_lost(tiny, tmp_path, hang, lost):
    output = tmp_path / "run"
    limits = [f"stability.hang_timeout={hang}", f"stability.lost_timeout={lost}", "train.max_steps=100000"]
    job = start("forked", [*tiny, *limits, "eval.before=false", f"output={output}"])
    until(lambda: sum(r["kind"] == "step" for r in metrics.read(output / "metrics.jsonl")) >= 5, job)
    victim = max(psutil.Process(job.pid).children(), key=lambda p: p.pid)
    victim.send_signal(signal.SIGSTOP)
    out, err = end(job)
    assert job.returncode, out + err
    (line,) = errors(err)
    if hang == "0":
        who = rf"error: rank 1 \(\S+, process {victim.pid}\)"
        assert re.match(rf"{who} gave no sign of life for 5 s .*last seen in (a )?step", line), line
    else:
        assert re.search(rf"rank 1 \(\S+, process {victim.pid}\): silent for \d+ s, last in (a )?step.*, for", err), err
        assert "all_reduce" in reported(err)[0] and 1 not in reported(err)
        assert "hang_timeout" in line


def test_a_scoring_rank_that_hangs_is_reported_and_ended(chats, tmp_path):
    (tmp_path / "extension.py").write_text(STUCK_SCORER)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": "red blue " * 20}) + "\n" for _ in range(60)))
    flags = ["--model", str(chats / "llama"), "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out")]
    options = ["score.tokens_per_batch=64", "score.report=false", "score.hang_timeout=4"]
    script = ROOT / "launch" / "score.py"
    job = start("forked", [*flags, *options], script, DS_LLM_EXTENSIONS=str(tmp_path / "extension.py"))
    out, err = end(job)
    assert job.returncode == 1, out + err
    assert re.search(r"^  rank 1 \(\S+, process \d+\): scoring, for \d+ s$", err, re.MULTILINE), err
    assert "in stuck" in reported(err)[1] and "wait_for_all" in reported(err)[0]
    (line,) = errors(err)
    assert "score.hang_timeout" in line and not (tmp_path / "out").exists()
