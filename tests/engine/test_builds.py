"""Builds of extensions by several real processes, some of which are killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from jobs import environment
from torch.utils.file_baton import FileBaton

from ds_llm.engine import builds

SOURCE = """
#include <Python.h>
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(ANSWER); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "quick", "", -1, methods};
PyMODINIT_FUNC PyInit_quick() { return PyModule_Create(&module); }
"""
COMPILER = """#!/bin/sh
case " $* " in *" -c "*) echo >> {folder}/compiled; while [ -e {folder}/hold ]; do sleep 0.05; done ;; esac
exec {compiler} "$@"
"""
# a process that loads the extension; it says its number, so that a test can kill it and not what it has started
WORKER = """
import os, sys
from pathlib import Path
from torch.utils import cpp_extension
from ds_llm import cli
from ds_llm.engine import builds

folder, name, kind, answer = Path(sys.argv[1]), *sys.argv[2:]

def main():
    if kind == "ours":
        builds.guard()
    part = folder / f"{name}.{os.getpid()}"  # the ranks of a job have one name
    part.write_text(str(os.getpid()))
    part.rename(folder / f"{name}.pid")
    module = cpp_extension.load("quick", [str(folder / "quick.cpp")], extra_cflags=[f"-DANSWER={answer}"])
    print(f"answer {module.answer()}")

cli.run(main)
"""


class Place:
    """A folder with an extension to build, a compiler that stops while the file `hold` is there, and the processes."""

    def __init__(self, folder: Path):
        self.folder, self.jobs = folder, []
        self.build = folder / "cache" / "quick"
        (folder / "quick.cpp").write_text(SOURCE)
        (folder / "worker.py").write_text(WORKER)
        compiler = folder / "g++"
        compiler.write_text(COMPILER.format(folder=folder, compiler=shutil.which("g++")))
        compiler.chmod(0o755)
        self.env = environment(TORCH_EXTENSIONS_DIR=str(folder / "cache"), CXX=str(compiler))

    def start(self, name: str, kind: str = "ours", answer: str = "42", processes: int = 1) -> forked.Job:
        arguments = [str(self.folder / "worker.py"), str(self.folder), name, kind, answer]
        self.jobs.append(forked.Job(processes, arguments, self.env))
        return self.jobs[-1]

    def hold(self) -> None:
        (self.folder / "hold").touch()

    def release(self) -> None:
        (self.folder / "hold").unlink(missing_ok=True)

    def compiled(self) -> int:
        """How often a source has been compiled."""
        path = self.folder / "compiled"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def kill(self, name: str) -> None:
        os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGKILL)


def until(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    place.release()
    for job in place.jobs:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_a_build_whose_builder_is_killed_is_made_by_one_that_waits(place, kind):
    """The builder's compiler lives on for a while, as it does when only the process is killed."""
    place.hold()
    place.start("builder", kind)
    until(lambda: place.compiled() == 1)
    waiting = [place.start(f"waiting{i}") for i in range(2)]
    until(lambda: all((place.folder / f"waiting{i}.pid").exists() for i in range(2)))
    time.sleep(1)  # until they wait
    place.kill("builder")
    time.sleep(1)
    assert waiting[0].poll() is None and waiting[1].poll() is None
    place.release()
    for job in waiting:
        out, err = job.communicate(120)
        assert job.returncode == 0 and "answer 42" in out and "Traceback" not in err, out + err
    assert not (place.build / "lock").exists()


def test_torch_alone_fails_where_a_killed_builders_lock_is_removed(place):
    """What `builds.load` is for: a library that is not there."""
    place.hold()
    place.start("builder", "foreign")
    until(lambda: place.compiled() == 1)
    waiting = place.start("waiting", "foreign")
    until((place.folder / "waiting.pid").exists)
    time.sleep(1)
    os.killpg(place.jobs[0].pid, signal.SIGKILL)
    (place.build / "lock").unlink()
    _, err = waiting.communicate(120)
    assert waiting.returncode != 0 and "quick.so: cannot open shared object file" in err


def test_processes_that_start_at_once_compile_once(place):
    jobs = [place.start("one", processes=2), place.start("other", processes=2)]
    for job in jobs:
        out, err = job.communicate(120)
        assert job.returncode == 0 and out.count("answer 42") == 2, out + err
    assert place.compiled() == 1


@pytest.mark.parametrize("damage", [lambda library: library.unlink(), lambda library: os.truncate(library, 64)])
def test_a_library_that_is_missing_or_damaged_is_built_anew(place, damage):
    assert "answer 42" in place.start("first").communicate(120)[0]
    damage(place.build / "quick.so")
    out, err = place.start("second").communicate(120)
    assert "answer 42" in out, out + err


def test_a_failure_is_one_line_with_the_reason_and_the_log_and_is_not_repeated(place):
    place.hold()
    first = place.start("first", answer="nonsense")
    until(lambda: place.compiled() == 1)
    second = place.start("second", answer="nonsense")
    until((place.folder / "second.pid").exists)
    time.sleep(3)
    place.release()
    log = place.build / "ds_llm_build.log"
    for job in (first, second):
        out, err = job.communicate(120)
        assert job.returncode == 1 and len(err.splitlines()) == 1, err
        assert err.startswith("error: the extension quick cannot be compiled: ") and str(log) in err
        assert "not declared" in err
        assert "compiling the extension quick, once on this machine: 2 s, about " in out
    assert "nonsense" in log.read_text() and place.compiled() == 2  # once more from nothing, and not by the second
    out, err = place.start("third").communicate(120)
    assert "answer 42" in out and not log.exists(), err


def test_a_folder_that_cannot_be_made_is_one_line(place):
    (place.folder / "cache").touch()
    job = place.start("first")
    err = job.communicate(120)[1]
    assert job.returncode == 1 and len(err.splitlines()) == 1 and "TORCH_EXTENSIONS_DIR" in err, err


HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_stays_while_its_builder_lives_and_goes_after_its_death(tmp_path, capsys, monkeypatch):
    lock = tmp_path / "lock"
    builder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert builder.stdout.readline() == "held\n"
        assert builds.mend(tmp_path) == []
        assert lock.exists()
    finally:
        builder.kill()
        builder.wait()
    assert lock.exists()  # what a killed builder leaves, and torch waits for
    monkeypatch.setenv("WORLD_SIZE", "2")  # on two machines: its builder may live on the other one
    assert builds.mend(tmp_path) == []
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert builds.mend(tmp_path) == [lock]
    assert str(lock) in capsys.readouterr().err
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    baton.release()
    lock.touch()
    long_ago = time.time() - 2 * builds.BUILD_SECONDS
    os.utime(lock, (long_ago, long_ago))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert builds.mend(tmp_path) == [lock]


BUILD = """
rule compile
  command = {wait} && echo "out: a.h" > out.d && cp in out
  deps = gcc
  depfile = out.d
build out: compile in
"""


@pytest.fixture
def ninja(tmp_path):
    """Run ninja in the folder of an extension; `wait` is a command that its compiler runs first."""
    for name in ("in", "a.h"):
        (tmp_path / name).touch()

    def run(wait: str = "true"):
        (tmp_path / "build.ninja").write_text(BUILD.format(wait=wait))
        command = [Path(sys.executable).parent / "ninja"]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)

    run.folder = tmp_path
    return run


def test_a_damaged_record_of_ninja_goes_so_that_it_does_not_compile_at_every_start(ninja):
    record = ninja.folder / ".ninja_deps"
    ninja().communicate()
    good = record.read_bytes()
    assert builds.mend(ninja.folder) == [] and record.exists()
    # a path record has the number of the path: two ninjas at once write it twice
    for damaged in (good[:-3], good[: len(good) // 2], good + good[16:], good + b"\xff\xff\xff\x7f", b"# ninja"):
        record.write_bytes(damaged)
        (ninja.folder / "lock").touch()
        with open(ninja.folder / "lock"):  # somebody compiles there now
            assert builds.mend(ninja.folder) == []
        (ninja.folder / "lock").unlink()
        assert builds.mend(ninja.folder) == [record] and not record.exists()
        ninja().communicate()
        out, _ = ninja().communicate()
        assert "no work to do" in out and "recovering" not in out
        assert builds.mend(ninja.folder) == []


def test_a_compiler_that_outlives_its_job_is_waited_for(ninja, capfd):
    left = ninja("sleep 2")
    (ninja.folder / "lock").touch()
    time.sleep(0.3)
    assert left.poll() is None
    assert builds.mend(ninja.folder) == [ninja.folder / "lock"]
    assert (ninja.folder / "out").exists()
    left.communicate()
    assert capfd.readouterr().err.count("waiting for the compiler") == 1
