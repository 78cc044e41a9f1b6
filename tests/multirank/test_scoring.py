"""Scoring jobs of two processes, one of them killed: the rest ends, and any number of processes goes on to the same
bytes."""

import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from chats import WORDS
from jobs import PATIENCE, ROOT, hold, launch, start, until

from ds_llm.scoring import options, parts, run

SCRIPT = ROOT / "launch" / "score.py"


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "data.jsonl"
    texts = (" ".join(random.choices(WORDS, k=random.randint(1, 8))) for _ in range(600))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "bad\n")
    return str(path)


def arguments(chats, data, out) -> list[str]:
    flags = ["--model", str(chats / "llama"), "--data", data, "--metric", "entropy", "ifd", "--field", "e0", "i0"]
    return [
        *flags,
        "--out",
        str(out),
        "score.tokens_per_batch=64",
        "score.report=false",
    ]  # small batches: time to be killed in


def score_here(chats, data, out) -> dict:
    flags = {"model": str(chats / "llama"), "data": [data], "out": str(out), "tokens_per_batch": 64, "report": False}
    return run.score(options.load(flags={**flags, "metric": ["entropy", "ifd"], "field": ["e0", "i0"]}))


def content(out: Path) -> list[bytes]:
    return [out.read_bytes(), (out.parent / f"{out.name}.d" / "rows.parquet").read_bytes()]


def test_a_job_of_which_a_rank_is_killed_goes_on_anywhere(chats, data, tmp_path):
    out = tmp_path / "scores.jsonl"
    folder = tmp_path / "scores.jsonl.d"

    def scored() -> list[int]:
        """Batches of each rank; the first record is a header."""
        return [sum(1 for _ in parts.read(path)) - 1 for path in folder.glob("parts/part-*.bin")]

    job = start("forked", arguments(chats, data, out), SCRIPT, **hold(tmp_path, "score", 20))
    try:
        until(lambda: len(scored()) == 2 and min(scored()) >= 10, job)
        max(psutil.Process(job.pid).children(), key=lambda process: process.pid).kill()  # rank 1, the last one forked
        (tmp_path / "go").touch()
        _, err = job.communicate(timeout=PATIENCE)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode != 0 and not out.exists()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: rank 1 \(\S+, process \d+\) is gone .* same command (again|continues)", line), err
    alone = tmp_path / "alone.jsonl"
    shutil.copytree(folder, tmp_path / "alone.jsonl.d")
    statistics = score_here(chats, data, alone)
    assert statistics["attempts"] == 2 and statistics["rows"] == 601 and statistics["errors"] == {"bad JSON": 1}
    undisturbed = tmp_path / "undisturbed.jsonl"
    assert score_here(chats, data, undisturbed)["attempts"] == 1
    job = launch("forked", arguments(chats, data, out), script=SCRIPT)
    assert job.returncode == 0, job.stderr
    assert "scoring (continued)" in job.stdout or "of them done before" in job.stdout
    assert content(alone) == content(undisturbed) == content(out)
