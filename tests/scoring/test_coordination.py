"""Ranks of a scoring run that work together: stages, progress, failures, and those that do not see rank 0's folder."""

import random
import threading

import pytest

from ds_llm.distributed import heartbeat as peers_module
from ds_llm.distributed import watchdog
from ds_llm.distributed.heartbeat import Peers
from ds_llm.errors import UserError
from ds_llm.scoring import coordination as module
from ds_llm.scoring import parts
from ds_llm.scoring.coordination import Elsewhere, Ranks, RemotePart


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(peers_module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def together(monkeypatch, folders, *roles):
    """Run one function of its `Ranks` per rank, in threads, each with its folder; what each returned or raised."""
    results, endpoint, own = [None] * len(roles), [], threading.local()
    monkeypatch.setattr(watchdog, "peers", lambda: own.peers)
    started = threading.Event()

    def run(number):
        meet = (lambda given: (endpoint.append(given), started.set())) if number == 0 else lambda _: endpoint[0]
        own.peers = peers = Peers(number, len(roles), 5, meet=meet)
        if number:
            started.wait(10)
        peers.start()
        failed = None
        try:
            ranks = Ranks(peers, folders[number])
            try:
                results[number] = roles[number](ranks)
            finally:
                ranks.close()
        except Exception as error:
            results[number], failed = error, str(error)
        peers.leave(failed)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(roles))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def test_stages_content_and_totals_reach_everyone(tmp_path, monkeypatch):
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
        return stage, told["batches"], ranks.shared

    found = together(monkeypatch, [tmp_path] * 3, zero, other, other)
    assert found == [(8, 80), *2 * [("ready", 3, True)]]


@pytest.mark.parametrize("failing", [0, 1])
def test_the_reason_of_a_failure_reaches_the_others(tmp_path, monkeypatch, failing):
    def fails(ranks):
        ranks.announce("indexed") if ranks.rank == 0 else ranks.wait_for("indexed")
        raise UserError("the disk is full")

    def waits(ranks):
        ranks.announce("indexed") if ranks.rank == 0 else ranks.wait_for("indexed")
        ranks.wait_for_all(lambda: None) if ranks.rank == 0 else ranks.wait_for("finished")

    found = together(monkeypatch, [tmp_path] * 2, *[fails if n == failing else waits for n in range(2)])
    assert isinstance(found[1 - failing], Elsewhere)
    assert str(found[1 - failing]).startswith(f"rank {failing} (")
    assert str(found[1 - failing]).endswith("failed: the disk is full")


def test_a_rank_with_another_folder_gets_the_files_and_its_scores_arrive(tmp_path, monkeypatch):
    """Three ranks on two machines: two share a copy, which is brought once and removed in the end."""
    mine, theirs = tmp_path / "a" / "out.d", tmp_path / "b" / "out.d"
    (mine / "index").mkdir(parents=True)
    data = {"index/rows.bin": random.randbytes(9_000_000), "index/empty": b"", "missing.npy": random.randbytes(100)}
    for name, content in data.items():
        (mine / name).write_bytes(content)
    payloads = [random.randbytes(random.randrange(1, 1000)) for _ in range(6)]

    def zero(ranks):
        (mine / "parts").mkdir()
        ranks.receive(lambda number: parts.Part(mine / "parts" / f"part-0001-{number:05d}.bin", {"of": "run"}))
        ranks.announce("ready", files=list(data))
        ranks.wait_for_all(lambda: None)
        ranks.announce("finished")

    def other(ranks):
        _, told = ranks.wait_for("ready")
        folder = ranks.fetch(told["files"])
        found = {name: (folder / name).read_bytes() for name in data}
        part = RemotePart(ranks.peers)
        for batch in range(ranks.rank - 1, 6, 2):
            part.append(batch, payloads[batch])
        ranks.progress["done"] = True
        ranks.wait_for("finished")
        ranks.forget()
        return found, ranks.shared

    zeroth, *others = together(monkeypatch, [mine, theirs, theirs], zero, other, other)
    assert zeroth is None and others == 2 * [(data, False)]
    assert dict(parts.records(mine / "parts", {"of": "run"})) == dict(enumerate(payloads))
    assert not theirs.exists() and mine.exists()


def test_a_request_to_stop_is_heard_alone_and_with_others(tmp_path):
    asked = iter([None, "SIGTERM"])
    ranks = Ranks(None, tmp_path, stop=lambda: next(asked))
    ranks.check()
    with pytest.raises(UserError, match=r"interrupted \(SIGTERM\); run the same command again") as error:
        ranks.check(force=True)
    assert error.value.exit_code == 75
