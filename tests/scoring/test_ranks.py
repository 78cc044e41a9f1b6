"""Ranks that know of each other by files: meeting, progress, failure, silence, leftovers of killed runs."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from ds_llm.errors import UserError
from ds_llm.scoring import ranks as module
from ds_llm.scoring.ranks import Elsewhere, Ranks


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)


def together(folder, *roles):
    """Run one function of its `Ranks` per rank, in threads; what each returned or raised."""
    results = [None] * len(roles)

    def run(number):
        try:
            with Ranks(folder, number, len(roles)) as ranks:
                results[number] = roles[number](ranks)
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in reversed(range(len(roles)))]
    for thread in threads:
        thread.start()
        time.sleep(0.03)  # rank 0, which clears the folder, comes last
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def leftover(folder, number, **more):
    """What a killed run left: the file of a process that is no more."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder.mkdir(exist_ok=True)
    state = {"name": "old", "host": socket.gethostname(), "pid": gone.pid, "started": 1.0, "stage": "finished"}
    state |= {"seen": {"1": "old"}, "failed": "of old", "beat": 5, "content": {"of": "old"}, "progress": {"done": True}}
    (folder / f"rank-{number}.json").write_text(json.dumps(state | more))


def test_stages_content_and_totals_reach_everyone_past_leftovers(tmp_path):
    leftover(tmp_path / "ranks", 0)
    leftover(tmp_path / "ranks", 1)
    leftover(tmp_path / "ranks", 7)

    def zero(ranks):
        ranks.announce("indexed")
        ranks.announce("ready", batches=3)
        ranks.progress.update(rows=5, tokens=50)
        ranks.wait_for_all(lambda: None)
        found = ranks.totals()
        ranks.announce("finished")
        return found

    def other(ranks):
        ranks.wait_for("indexed")
        stage, told = ranks.wait_for("ready")
        ranks.progress.update(rows=ranks.rank, tokens=10 * ranks.rank, done=True)
        ranks.wait_for("finished")
        return stage, told

    assert together(tmp_path / "ranks", zero, other, other) == [(8, 80), *2 * [("ready", {"batches": 3})]]
    assert not (tmp_path / "ranks").exists()


def test_a_rank_that_starts_late_still_learns_that_all_is_done(tmp_path):
    def zero():
        with Ranks(tmp_path / "ranks", 0, 2) as ranks:
            ranks.announce("finished")

    thread = threading.Thread(target=zero)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    with Ranks(tmp_path / "ranks", 1, 2) as ranks:
        assert ranks.wait_for("indexed")[0] == "finished"
    thread.join(30)
    assert not thread.is_alive() and not (tmp_path / "ranks").exists()


@pytest.mark.parametrize("failing", [0, 1])
def test_the_reason_of_a_failure_reaches_the_others(tmp_path, failing):
    def fails(ranks):
        if ranks.rank:
            ranks.wait_for("indexed")
        else:
            ranks.announce("indexed")
            time.sleep(0.1)
        raise UserError("the disk is full")

    def waits(ranks):
        ranks.announce("indexed") if ranks.rank == 0 else ranks.wait_for("indexed")
        ranks.wait_for_all(lambda: None) if ranks.rank == 0 else ranks.wait_for("finished")

    found = together(tmp_path / "ranks", *[fails if number == failing else waits for number in range(2)])
    assert isinstance(found[1 - failing], Elsewhere)
    assert str(found[1 - failing]) == f"rank {failing} failed: the disk is full"


def test_a_rank_that_is_gone_or_silent_ends_the_others(tmp_path, monkeypatch):
    def pretend(ranks, **state):
        """Rank 1 as a file that nobody writes any more."""
        ranks._own["seen"]["1"] = "it"
        leftover(tmp_path / "ranks", 1, name="it", failed=None, progress={}, **state)
        ranks.wait_for_all(lambda: None)

    with (
        pytest.raises(Elsewhere, match=r"rank 1 .* is gone; run the same command again"),
        Ranks(tmp_path / "ranks", 0, 2) as ranks,
    ):
        pretend(ranks)
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.1)
    for state in ({"host": "another"}, {"pid": os.getpid(), "started": module.since_boot(module.psutil.Process())}):
        with pytest.raises(Elsewhere, match="no sign of life"), Ranks(tmp_path / "ranks", 0, 2) as ranks:
            pretend(ranks, **state)


def test_a_rank_that_never_comes_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "START_SECONDS", 0.1)
    with pytest.raises(Elsewhere, match=r"rank 0 did not show in .*ranks"), Ranks(tmp_path / "ranks", 1, 2) as ranks:
        ranks.wait_for("indexed")
    with pytest.raises(Elsewhere, match="rank 1 did not show"), Ranks(tmp_path / "ranks", 0, 2) as ranks:
        ranks.wait_for_all(lambda: None)


def test_a_request_to_stop_is_heard_alone_and_with_others(tmp_path):
    asked = iter([None, "SIGTERM"])
    with Ranks(tmp_path / "ranks", 0, 1, stop=lambda: next(asked)) as ranks:
        ranks.check()
        with pytest.raises(UserError, match=r"interrupted \(SIGTERM\); run the same command again") as error:
            ranks.check(force=True)
    assert error.value.exit_code == 75 and not (tmp_path / "ranks").exists()
