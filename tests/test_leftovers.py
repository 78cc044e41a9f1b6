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
        assert leftovers.remove_stale_build_locks() == []
        assert lock.exists()
    finally:
        builder.kill()
        builder.wait()
    assert lock.exists()  # what a killed builder leaves, and torch waits for
    monkeypatch.setenv("WORLD_SIZE", "2")  # on two machines: its builder may live on the other one
    assert leftovers.remove_stale_build_locks() == []
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert leftovers.remove_stale_build_locks() == [lock]
    assert str(lock) in capsys.readouterr().err
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    baton.release()
    lock.touch()
    long_ago = time.time() - 2 * leftovers.BUILD_SECONDS
    os.utime(lock, (long_ago, long_ago))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert leftovers.remove_stale_build_locks() == [lock]


def test_no_cache_folder_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    assert leftovers.remove_stale_build_locks() == []


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
