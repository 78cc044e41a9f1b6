"""Preparation that is killed, starved of disk space or started twice, in real processes."""

import json
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from jobs import PATIENCE

from ds_llm.data.clean import clean
from ds_llm.data.encode import encode
from ds_llm.data.resumable import Run
from ds_llm.errors import UserError

from .conftest import random_text, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")  # the children have every library already


def results(folder: Path) -> dict[str, bytes]:
    """What a run leaves, by name."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and not p.name.endswith(".lock")}


@pytest.fixture
def source(tmp_path, rng):
    """Two files, with duplicates and rows to be dropped."""
    texts = [random_text(rng, rng.randint(1, 30)) for _ in range(160)]
    rows = [{"text": text} for text in [*texts, *rng.choices(texts, k=40)]] + [{"text": ""}, {"other": 1}] * 10
    rng.shuffle(rows)
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", rows[:100])
    write_jsonl(tmp_path / "in" / "b.jsonl", rows[100:])
    return tmp_path / "in"


@pytest.fixture
def job(request, source, tokenizer_folder):
    """Runs one command into a folder, in small batches and with a save after each; `tokens` unless a test says more."""
    options = {"workers": 1, "batch_bytes": 500, "save_seconds": 0.0}
    if getattr(request, "param", "tokens") == "clean":
        return lambda folder, **more: clean([source], folder / "out.jsonl", **options | more)
    return lambda folder, **more: encode(
        [source], folder / "out.bin", tokenizer_folder, validation=0.2, **options | more
    )


def start(function, *arguments) -> multiprocessing.Process:
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def stand_still(saves: int, function, *arguments):
    """Start a process that stands still before it saves for the n-th time; returns it and what lets it go on."""
    reached, go = FORK.Event(), FORK.Event()

    def run() -> None:
        save, left = Run.save, [saves]

        def counted(self, state: dict) -> None:
            left[0] -= 1
            if not left[0]:
                reached.set()
                go.wait()
            save(self, state)

        Run.save = counted
        function(*arguments)

    process = start(run)
    assert reached.wait(PATIENCE)
    return process, go


@pytest.mark.parametrize("job", ["clean", "tokens"], indirect=True)
def test_killed_at_random_moments_the_result_is_the_same(tmp_path, rng, job, monkeypatch):
    """A moment is a number of Python's calls since the first save: other work on the machine does not shift it."""
    monkeypatch.setattr("ds_llm.data.statistics.picture", lambda *_: b"many calls, and none of them matters here")
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    save = Run.save

    def counting(folder: Path, last: float) -> int:
        """The calls of a run, which kills itself at the one after `last`."""
        calls = 0

        def count(*_) -> None:
            nonlocal calls
            calls += 1
            if calls > last:
                os.kill(os.getpid(), signal.SIGKILL)

        def saving(self, state: dict) -> None:
            sys.setprofile(count)
            save(self, state)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "save", saving)
            try:
                job(folder)
            finally:
                sys.setprofile(None)
        return calls

    total, continued = counting(tmp_path / "whole", math.inf), 0
    for _ in range(8):
        process = start(counting, tmp_path / "cut", rng.randrange(total // 3))
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        continued += bool(list((tmp_path / "cut").glob("*.partial.json")))
    job(tmp_path / "cut")
    assert continued, "no run was killed between its first save and its end"
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def test_killed_at_every_step_of_publishing_the_result_is_the_same(tmp_path, job, monkeypatch):
    """A child kills itself at its n-th rename or removal, for every n; the next run must mend everything."""
    monkeypatch.setattr("ds_llm.data.statistics.picture", lambda *_: b"the slow part, and none of the matter here")
    quick = {"batch_bytes": 1 << 20, "save_seconds": 1e9}
    (tmp_path / "whole").mkdir()
    job(tmp_path / "whole", **quick)

    def dying(folder: Path, steps: int) -> None:
        left = [steps]

        def counted(function):
            def call(*arguments, **options):
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return function(*arguments, **options)

            return call

        os.replace, os.unlink = counted(os.replace), counted(os.unlink)
        job(folder, **quick)

    for steps in range(100):
        folder = tmp_path / f"cut{steps}"
        folder.mkdir()
        process = start(dying, folder, steps)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        job(folder, **quick)
        assert results(folder) == results(tmp_path / "whole"), f"killed at step {steps}"
    assert steps >= 6


@pytest.mark.parametrize("command", ["clean", "tokens"])
def test_the_launch_script_is_killed_and_takes_its_workers_with_it(tmp_path, tokenizer_folder, command):
    rng = random.Random(3)
    (tmp_path / "in").mkdir()
    for i in range(4):
        write_jsonl(tmp_path / f"in/{i}.jsonl", [{"text": random_text(rng, 200)} for _ in range(100)])
    suffix = "jsonl" if command == "clean" else "bin"
    line = [sys.executable, str(ROOT / "launch/prepare.py"), command, str(tmp_path / "in"), "--workers", "2"]
    line += ["--out", str(tmp_path / "cut" / f"out.{suffix}")]
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    if command == "tokens":
        line += ["--tokenizer", str(tokenizer_folder)]
        encode([tmp_path / "in"], tmp_path / "whole/out.bin", tokenizer_folder, workers=1)
    else:
        clean([tmp_path / "in"], tmp_path / "whole/out.jsonl", workers=1)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    main, children = psutil.Process(process.pid), []
    while len(children) < 3 and process.poll() is None:  # two workers and Python's resource tracker
        children = main.children(recursive=True)
        time.sleep(0.01)
    assert process.poll() is None, "ended before its workers were seen"
    process.kill()
    process.wait()
    assert not psutil.wait_procs(children, timeout=PATIENCE)[1]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "400" in done.stdout
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


@pytest.mark.parametrize("job", ["clean", "tokens"], indirect=True)
def test_a_full_disk_is_one_error_and_the_work_goes_on_afterwards(tmp_path, job):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    job(tmp_path / "whole")
    limit = max(len(content) for content in results(tmp_path / "whole").values()) // 3

    def starved(folder: Path, answer) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            job(folder)
        except UserError as error:
            answer.send(str(error))
        answer.close()

    receiver, sender = FORK.Pipe(duplex=False)
    process = start(starved, tmp_path / "cut", sender)
    assert receiver.poll(PATIENCE)
    message = receiver.recv()
    process.join()
    assert "File too large" in message and "the same command continues" in message
    job(tmp_path / "cut")
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def test_a_second_run_on_one_output_is_refused(tmp_path, job, rng):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    job(tmp_path / "whole")
    process, go = stand_still(rng.randint(1, 8), job, tmp_path / "cut")
    try:
        with pytest.raises(UserError, match="another process is writing it"):
            job(tmp_path / "cut")
    finally:
        go.set()
    process.join()
    assert process.exitcode == 0
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


@pytest.mark.parametrize("job", ["clean", "tokens"], indirect=True)
def test_nothing_that_was_saved_is_done_again(tmp_path, job, monkeypatch, rng):
    from ds_llm.data import workers

    (tmp_path / "cut").mkdir()
    process, _ = stand_still(rng.randint(4, 20), job, tmp_path / "cut")
    process.kill()
    process.join()
    (record,) = (tmp_path / "cut").glob("*.partial.json")
    saved = json.loads(record.read_bytes())["state"]["position"]
    assert saved > [0, 0, 0]
    starts = []

    def read(sources, position, size):
        starts.append([position.file, position.record, position.offset])
        return original(sources, position, size)

    original = workers.read
    monkeypatch.setattr(workers, "read", read)
    job(tmp_path / "cut")
    assert starts == [saved]


def test_unfinished_work_of_other_settings_is_not_mixed_in(tmp_path, source):
    out = tmp_path / "out.jsonl"
    process, _ = stand_still(20, lambda: clean([source], out, workers=1, batch_bytes=100, save_seconds=0.0))
    process.kill()
    process.join()
    partial = tmp_path / "out.jsonl.partial"
    partial.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"out\.jsonl\.partial: unfinished work is missing here; remove the"):
        clean([source], out, workers=1)
    (tmp_path / "elsewhere").rename(partial)
    with pytest.raises(UserError, match=r"unfinished run with another min_chars.*--overwrite"):
        clean([source], out, min_chars=30, workers=1)
    clean([source], out, min_chars=30, workers=1, overwrite=True)
    assert all(len(json.loads(line)["text"]) >= 30 for line in out.read_text(encoding="utf-8").splitlines())


def test_a_dead_worker_is_one_error_and_the_work_goes_on_afterwards(tmp_path, source, tokenizer_folder):
    rng = random.Random(4)
    write_jsonl(tmp_path / "a.jsonl", [{"text": random_text(rng, 300)} for _ in range(1000)])
    out = tmp_path / "out.jsonl"

    def run(answer) -> None:
        try:
            clean([tmp_path / "a.jsonl"], out, workers=2, batch_bytes=2000, save_seconds=0.0)
        except UserError as error:
            answer.send(str(error))
        answer.close()

    receiver, sender = FORK.Pipe(duplex=False)
    process, go = stand_still(2, run, sender)
    workers = [p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    workers[0].kill()
    go.set()
    assert receiver.poll(PATIENCE)
    assert "a worker process died" in receiver.recv()
    process.join()
    clean([tmp_path / "a.jsonl"], out, workers=1, batch_bytes=2000)
    assert len(out.read_text(encoding="utf-8").splitlines()) == 1000
