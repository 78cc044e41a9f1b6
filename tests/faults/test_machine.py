"""Disks that are full or read-only, clocks that jump, slow processes, two jobs in one place, kills at random."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hostile import mounted, one_line, root_only
from jobs import PATIENCE, ROOT, environment, hold, launch, start, until

from ds_llm.checkpoint import folder as checkpoint
from ds_llm.config import run as config
from ds_llm.convert.export import export
from ds_llm.data import supervised
from ds_llm.data.clean import clean
from ds_llm.data.encode import encode
from ds_llm.data.tokenizer import train_tokenizer
from ds_llm.distributed import interrupt
from ds_llm.errors import UserError
from ds_llm.files import new_folder
from ds_llm.pretrained.loading import load_tokenizer
from ds_llm.scoring import options, run
from ds_llm.sweeps import trial
from ds_llm.tracking import metrics_file as metrics
from ds_llm.train import trainer

SCORE = ROOT / "launch" / "score.py"


def score_flags(chats: Path, data: Path, out: Path) -> dict:
    return {"model": str(chats / "llama"), "data": [str(data)], "out": str(out), "report": False}


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [
        " ".join(random.choices(["red", "blue", "green", "cat", "dog"], k=random.randint(5, 30))) for _ in range(300)
    ]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def writers(chats, texts, tiny):
    """What writes something, by name: each makes its output in a folder and returns the files that matter."""

    def train(folder: Path) -> list[Path]:
        keys = ["train.max_steps=2", "checkpoint.every_steps=1", "eval.before=false", "data.val=[]", "zero=0"]
        keys += ["tracking.tensorboard=true", "tracking.report=true"]
        assert trainer.train(config.load(None, [*tiny, *keys, f"output={folder / 'run'}"])) == 0
        return [folder / "run/model/model.safetensors", folder / "run/checkpoints/step-00000002/trainer.json"]

    def prepare(folder: Path) -> list[Path]:
        clean([texts], folder / "c.jsonl", workers=1)
        return [folder / "c.jsonl"]

    def tokens(folder: Path) -> list[Path]:
        encode([texts], folder / "t.bin", chats / "tokenizer", workers=1)
        return [folder / "t.bin", folder / "t.idx"]

    def tokenizer(folder: Path) -> list[Path]:
        train_tokenizer([texts], folder / "tok", vocab_size=262)
        return [folder / "tok/tokenizer.json"]

    def samples(folder: Path) -> list[Path]:
        tokenizer = load_tokenizer(chats / "llama")
        made = supervised.prepare([chats / "train.jsonl"], tokenizer, max_length=64, cache=folder / "cache")
        return [made.folder / "ids.bin", made.folder / "report.json"]

    def score(folder: Path) -> list[Path]:
        run.score(options.load(flags=score_flags(chats, texts, folder / "s.jsonl")))
        return [folder / "s.jsonl", folder / "s.jsonl.d/rows.parquet"]

    def merged(folder: Path) -> list[Path]:
        export(chats / "llama", folder / "exported")
        return [folder / "exported/model.safetensors"]

    return {f.__name__: f for f in (train, prepare, tokens, tokenizer, samples, score, merged)}


@root_only
def test_a_disk_without_space_is_one_line_and_what_was_done_goes_on_when_it_has_some(writers, tmp_path):
    """A real small file system with little room, then none, then enough."""
    with mounted(tmp_path / "disk", "size=40m") as disk:
        filler = disk / "filler"
        for name, write in writers.items():
            folder = disk / name
            for room in (random.randrange(4096, 20_000), 0):
                folder.mkdir(exist_ok=True)
                free = shutil.disk_usage(disk).free
                with open(filler, "wb") as file:
                    file.write(b"x" * max(0, free - room))
                with pytest.raises(UserError) as raised:
                    write(folder)
                one_line(raised.value)
                filler.unlink()
            assert all(path.stat().st_size for path in write(folder)), name


@root_only
def test_a_read_only_place_is_one_line_before_any_work(writers, tmp_path):
    with mounted(tmp_path / "disk", "size=1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for name, write in writers.items():
            with pytest.raises(UserError, match="Read-only file system") as raised:
                write(disk)
            assert str(disk) in one_line(raised.value), name


def test_a_clock_that_jumps_gives_no_wrong_figure_and_no_wrong_checkpoint(tiny, tmp_path, monkeypatch):
    """Hours and years, forwards and backwards, between any two looks at the clock; the newest checkpoint the oldest."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: max(1.0, real() + random.choice([-1, 1]) * random.choice([60, 1e5, 1e8])))
    keys = [*tiny, "checkpoint.every_steps=2", "checkpoint.keep=0", "zero=0", "eval.max_windows=2"]
    keys = [*keys, "tracking.report=true", "tracking.tensorboard=true", f"output={tmp_path / 'run'}"]
    assert trainer.train(config.load(None, [*keys, "train.max_steps=4"])) == 0
    for step in checkpoint.steps(tmp_path / "run"):
        os.utime(checkpoint.folder(tmp_path / "run", step), (2e9 - 1e8 * step,) * 2)
    assert trainer.train(config.load(None, [*keys, "train.max_steps=6"])) == 0
    records = metrics.read(tmp_path / "run" / "metrics.jsonl")
    (resumed,) = [r for r in records if r["kind"] == "event" and r["event"] == "resume"]
    assert resumed["step"] == 4
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 7))
    for r in steps:
        assert 0 < r["step_time"] < 100 and r["tokens_per_s"] > 0 and 0 <= r["eta"] < 1000
    assert all(0 <= r["seconds"] < 100 for r in records if r["kind"] == "eval")
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_processes_are_known_again_after_the_clock_was_set(monkeypatch):
    """The start of a process by the wall clock moves with it, which psutil takes from the machine's boot time."""
    child = subprocess.Popen(["sleep", str(PATIENCE)])
    try:
        identity = [child.pid, interrupt.since_boot(psutil.Process(child.pid))]
        for module in (psutil, psutil._pslinux):
            before = module.boot_time()
            monkeypatch.setattr(module, "boot_time", lambda moved=before + 7200: moved)
        assert interrupt.since_boot(psutil.Process(child.pid)) == pytest.approx(identity[1], abs=1)
        assert not trial.end_orphan([child.pid, identity[1] + 60])  # another process of that number
        assert child.poll() is None and trial.end_orphan(identity)
    finally:
        child.kill()
        child.wait()


def ranks(job, number: str) -> psutil.Process:
    """The process of a rank of a job of `forked`; it is the second child, in order of start."""
    children = sorted(psutil.Process(job.pid).children(), key=lambda p: p.pid)
    return children[int(number)]


def test_one_slow_rank_changes_nothing(tiny, tmp_path):
    """A rank that stands still for seconds, again and again, is waited for; the result has the same bits."""
    keys = [*tiny, "train.max_steps=12", "eval.before=false", "data.val=[]", "zero=2", "checkpoint.every_steps=4"]
    job = start("forked", [*keys, f"output={tmp_path / 'slow'}"], **hold(tmp_path, "step", 10))
    figures = tmp_path / "slow" / "metrics.jsonl"
    for step in (1, 5):
        until(lambda step=step: sum(r["kind"] == "step" for r in metrics.read(figures)) >= step, job)
        slow = ranks(job, str(random.randrange(2)))
        slow.suspend()
        time.sleep(random.uniform(0.5, 2))
        slow.resume()
    (tmp_path / "go").touch()
    out, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, out + err
    even = launch("forked", [*keys, f"output={tmp_path / 'even'}"])
    assert even.returncode == 0, even.stdout + even.stderr
    found, expected = (metrics.deterministic(metrics.read(tmp_path / n / "metrics.jsonl")) for n in ("slow", "even"))
    assert found == expected
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("slow", "even")]
    assert weights[0] == weights[1]


def test_two_scorings_in_one_place(chats, texts, tmp_path):
    """The second one is refused while the first one lives, even one that stands still, and harms nothing."""
    out = tmp_path / "s.jsonl"
    arguments = ["--model", str(chats / "llama"), "--data", str(texts), "--out", str(out), "score.report=false"]
    job = start("forked-1", [*arguments, "score.tokens_per_batch=64"], SCORE, **hold(tmp_path, "score", 20))
    until(lambda: any((tmp_path / "s.jsonl.d").glob("parts/part-*")), job)
    (first,) = psutil.Process(job.pid).children()
    first.suspend()
    flags = score_flags(chats, texts, out) | {"tokens_per_batch": 64}
    with pytest.raises(UserError, match="another run is writing here; wait for it or choose another --out") as raised:
        run.score(options.load(flags=flags))
    one_line(raised.value)
    first.resume()
    (tmp_path / "go").touch()
    stdout, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, stdout + err
    assert run.score(options.load(flags=flags))["rows"] == 300  # finished before


def test_two_writers_of_one_folder_and_one_that_was_killed(chats, tmp_path):
    out = tmp_path / "exported"
    script = "from ds_llm.files import new_folder; from pathlib import Path; import time\n"
    script += (
        f"with new_folder(Path({str(out)!r})) as p: (p / 'half').write_text('x'); print(p, flush=True); "
        f"time.sleep({PATIENCE})"
    )
    other = subprocess.Popen([sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE, text=True)
    partial = Path(other.stdout.readline().strip())
    with pytest.raises(UserError, match="another process is writing it; wait for it or name another folder"):
        export(chats / "llama", out)
    assert (partial / "half").exists() and not out.exists()
    other.send_signal(signal.SIGKILL)
    other.wait()
    export(chats / "llama", out)
    assert not partial.exists() and not (out / "half").exists() and (out / "model.safetensors").exists()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "fails") as started:
        raise RuntimeError
    assert not started.exists() and not (tmp_path / "fails").exists()


def test_killed_at_random_moments(tmp_path, request):
    """A few of the kills of which `python -m benchmarks.random_kills` does hundreds; --kills asks for more."""
    kills = request.config.getoption("--kills", default=6)
    command = [sys.executable, "-m", "benchmarks.random_kills", "--kills", str(kills), "--json", "found.json"]
    done = subprocess.run(
        command,
        env=environment(
            PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), TMPDIR=str(tmp_path)
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr  # the seed is its first line
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["kills"] == kills == sum(work["kills"] for work in found["works"])
    assert {work["work"] for work in found["works"]} == {"train", "clean", "tokens", "score"}
