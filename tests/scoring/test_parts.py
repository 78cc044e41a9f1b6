"""Part files: torn at every byte, damaged at every byte, foreign."""

import os
import random

import pytest

from ds_llm.errors import UserError
from ds_llm.scoring import parts
from ds_llm.scoring.parts import Part, read, records

SETTINGS = {"model": "m" * 64, "metric": ["entropy"], "max_length": 128}


def write(path, batches, settings=SETTINGS):
    part = Part(path, settings)
    for batch, payload in batches:
        part.append(batch, payload)
    part.close()


@pytest.fixture
def some():
    return [(random.randrange(1 << 32), random.randbytes(random.randrange(40))) for _ in range(4)]


def test_all_records_come_back(tmp_path, some):
    write(tmp_path / "part-0001-00000.bin", some)
    write(tmp_path / "part-0001-00001.bin", [some[0], (7, b"more")])
    assert list(records(tmp_path, SETTINGS)) == [*some, (7, b"more")]
    with pytest.raises(FileExistsError):
        Part(tmp_path / "part-0001-00001.bin", SETTINGS)


def test_of_a_torn_part_the_whole_records_are_read(tmp_path, some):
    path = tmp_path / "part-0001-00000.bin"
    write(path, [])
    ends = [path.stat().st_size]
    path.unlink()
    write(path, some)
    for _, payload in some:
        ends.append(ends[-1] + parts.RECORD.size + len(payload))
    data = path.read_bytes()
    assert ends[-1] == len(data)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends) - 1
        assert list(records(tmp_path, SETTINGS)) == some[: max(0, whole)]


def test_a_changed_byte_never_gives_another_record(tmp_path, some):
    path = tmp_path / "part-0001-00000.bin"
    write(path, some)
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << random.randrange(8))]) + data[place + 1 :])
        found = list(read(path))[1:]
        assert found == some[: len(found)] and len(found) < len(some)


def test_parts_of_other_runs_are_refused_with_what_differs(tmp_path, some):
    write(tmp_path / "part-0001-00000.bin", some, {**SETTINGS, "max_length": 64, "model": "n" * 64})
    with pytest.raises(UserError, match=r"another max_length \(64 there, 128 now\) and model; remove it") as error:
        list(records(tmp_path, SETTINGS))
    assert "\n" not in str(error.value) and "part-0001-00000.bin" in str(error.value)
    (tmp_path / "part-0001-00000.bin").write_bytes(b"anything")
    with pytest.raises(UserError, match="is no part of a scoring run; remove it"):
        list(records(tmp_path, SETTINGS))


def test_records_reach_the_disk_in_time(tmp_path, some, monkeypatch):
    synced = []
    original = os.fsync
    monkeypatch.setattr(parts.os, "fsync", lambda file: synced.append(1) or original(file))
    monkeypatch.setattr(parts, "SYNC_SECONDS", 0.0)
    write(tmp_path / "part-0001-00000.bin", some)
    assert len(synced) >= 1 + len(some) + 1
