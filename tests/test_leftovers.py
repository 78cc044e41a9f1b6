"""Build locks and shared buffers: stale ones go, living ones stay."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from ds_llm import leftovers

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_stays_while_its_builder_lives_and_goes_after_its_death(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py3_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    builder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert builder.stdout.readline() == "held\n"
        assert leftovers.mend_builds() == []
        assert lock.exists()
    finally:
        builder.kill()
        builder.wait()
    assert lock.exists()  # what a killed builder leaves, and torch waits for
    monkeypatch.setenv("WORLD_SIZE", "2")  # on two machines: its builder may live on the other one
    assert leftovers.mend_builds() == []
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert leftovers.mend_builds() == [lock]
    assert str(lock) in capsys.readouterr().err
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    baton.release()
    lock.touch()
    long_ago = time.time() - 2 * leftovers.BUILD_SECONDS
    os.utime(lock, (long_ago, long_ago))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert leftovers.mend_builds() == [lock]


BUILD = """
rule compile
  command = {wait} && echo "out: a.h" > out.d && cp in out
  deps = gcc
  depfile = out.d
build out: compile in
"""


@pytest.fixture
def ninja(tmp_path, monkeypatch):
    """Run ninja in a build folder of torch's cache; `wait` is a command that its compiler runs first."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "py3_cpu" / "cpu_adam"
    folder.mkdir(parents=True)
    for name in ("in", "a.h"):
        (folder / name).touch()

    def run(wait: str = "true"):
        (folder / "build.ninja").write_text(BUILD.format(wait=wait))
        command = [Path(sys.executable).parent / "ninja"]
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)

    run.folder = folder
    return run


def test_a_damaged_record_of_ninja_goes_so_that_it_does_not_compile_at_every_start(ninja):
    record = ninja.folder / ".ninja_deps"
    ninja().communicate()
    good = record.read_bytes()
    assert leftovers.mend_builds() == [] and record.exists()
    # a path record has the number of the path: two ninjas at once write it twice
    for damaged in (good[:-3], good[: len(good) // 2], good + good[16:], good + b"\xff\xff\xff\x7f", b"# ninja"):
        record.write_bytes(damaged)
        (ninja.folder / "lock").touch()
        with open(ninja.folder / "lock"):  # somebody compiles there now
            assert leftovers.mend_builds() == []
        (ninja.folder / "lock").unlink()
        assert leftovers.mend_builds() == [record] and not record.exists()
        ninja().communicate()
        out, _ = ninja().communicate()
        assert "no work to do" in out and "recovering" not in out
        assert leftovers.mend_builds() == []


def test_a_compiler_that_outlives_its_job_is_waited_for(ninja, capfd):
    left = ninja("sleep 1")
    (ninja.folder / "lock").touch()
    time.sleep(0.3)
    assert left.poll() is None
    assert leftovers.mend_builds() == [ninja.folder / "lock"]
    assert (ninja.folder / "out").exists()
    left.communicate()
    assert capfd.readouterr().err.count("waiting for the compiler") == 1


def test_no_cache_folder_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    assert leftovers.mend_builds() == []


def test_shared_memory_counts_what_every_local_process_needs(tmp_path, capsys):
    room = os.statvfs(tmp_path)
    fits = room.f_bavail * room.f_frsize // leftovers.SHARED_BUFFER_BYTES // 2
    assert leftovers.shared_memory_suffices(fits, str(tmp_path))
    assert capsys.readouterr().out == ""
    assert not leftovers.shared_memory_suffices(fits * 3, str(tmp_path))
    assert "--shm-size" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_only_the_own_buffer_is_unlinked(monkeypatch):
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(os.getpid())), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    stem = f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{os.getpid()}"
    mine, other = Path(f"{stem}_1"), Path(f"{stem}_0")
    try:
        mine.write_bytes(b"")
        other.write_bytes(b"")
        leftovers.unlink_shared_buffer()
        assert not mine.exists() and other.exists()
        leftovers.unlink_shared_buffer()
    finally:
        other.unlink()
