"""Ranks that know of each other over connections: meeting, beats, goodbyes, failures, silence, strangers, questions."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from jobs import PATIENCE

from ds_llm.distributed import heartbeat as module
from ds_llm.distributed import messages
from ds_llm.distributed.heartbeat import Peers
from ds_llm.errors import UserError

CHILD = """
import sys, time
from ds_llm.distributed import heartbeat
heartbeat.BEAT_SECONDS = 0.05
other = heartbeat.Peers(1, 2, 60, meet=lambda _: sys.argv[1])
other.own["doing"] = "step 7"
other.start()
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


@pytest.fixture
def job():
    """Starts the ranks of a job in threads of this process; all are gone afterwards."""
    started = []

    def start(world, lost_seconds=60.0, **more):
        endpoint = []
        for rank in range(world):
            meet = endpoint.append if rank == 0 else lambda _: endpoint[0]
            started.append(Peers(rank, world, lost_seconds, meet=meet, **more))
            started[-1].start()
        started[0].endpoint = endpoint[0]
        return list(started)

    yield start
    for found in reversed(started):
        found._left = set(range(found.world))  # rank 0 waits for nobody
        found.leave()


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_ranks_show_reaches_rank_0_and_its_own_reaches_all(job):
    zero, *others = job(4)
    secret = random.random()
    zero.own["doing"] = secret
    for peer in others:
        peer.own["doing"] = peer.rank * secret
    until(lambda: all(zero.states.get(p.rank, {}).get("doing") == p.rank * secret for p in others))
    until(lambda: all(p.states.get(0, {}).get("doing") == secret for p in others))
    assert zero.name(2) == f"rank 2 ({socket.gethostname()}, process {os.getpid()})"
    for peer in others:
        peer.leave()
    zero.leave()
    assert all(p.verdict is None for p in (zero, *others))


def test_who_fails_ends_the_job_for_all_with_its_reason(job):
    zero, one, two = job(3)
    two.leave("the disk is full")
    until(lambda: one.verdict and zero.verdict)
    assert zero.verdict.own and not one.verdict.own
    for found in (zero.verdict, one.verdict):
        assert (found.kind, found.rank) == ("failed", 2) and found.text.endswith("failed: the disk is full")


def test_rank_0_that_fails_says_so_before_it_goes(job):
    zero, one = job(2)
    zero.leave("no such file")
    until(lambda: one.verdict)
    assert one.verdict.text == f"{zero.name(0)} failed: no such file"


def test_a_rank_that_starts_after_rank_0_has_failed_learns_why():
    endpoints = []
    zero = Peers(0, 2, 60, meet=endpoints.append)
    zero.start()
    ending = threading.Thread(target=zero.leave, args=("no such file",))
    ending.start()
    time.sleep(0.3)
    assert ending.is_alive()
    one = Peers(1, 2, 60, meet=lambda _: endpoints[0])
    one.start()
    until(lambda: one.verdict)
    ending.join(PATIENCE)
    assert not ending.is_alive() and one.verdict.text.endswith("failed: no such file")
    one.leave()
    with pytest.raises(UserError, match=r"^rank 0 .*: no such file$") as error:  # what it left in the store
        Peers(1, 2, 5, meet=lambda _: module.FAILED + one.verdict.text).start()
    assert not error.value.any_rank


@pytest.mark.parametrize(
    ("number", "lost", "said"), [(signal.SIGKILL, 60, "is gone"), (signal.SIGSTOP, 2, "gave no sign of life for 2 s")]
)
def test_a_process_that_is_killed_or_stopped_is_named_with_its_host_and_what_it_did(job, number, lost, said):
    zero = Peers(0, 2, lost, meet=lambda endpoint: endpoints.append(endpoint))
    endpoints = []
    zero.start()
    child = subprocess.Popen([sys.executable, "-c", CHILD, endpoints[0]])
    try:
        until(lambda: zero.states.get(1, {}).get("doing") == "step 7")
        child.send_signal(number)
        until(lambda: zero.verdict)
        assert zero.verdict.kind == "lost" and said in zero.verdict.text
        assert zero.verdict.text.startswith(f"rank 1 ({socket.gethostname()}, process {child.pid}) ")
        assert zero.verdict.text.endswith("last seen in step 7")
        assert zero.stuck() == ({1} if number == signal.SIGSTOP else set())
    finally:
        child.kill()
        child.wait()
        zero.leave()


def test_rank_0_that_vanishes_is_found_by_the_others(job):
    zero, one = job(2)
    until(lambda: one.states)
    one._connection.shutdown(socket.SHUT_RDWR)
    until(lambda: one.verdict)
    assert one.verdict.own and one.verdict.kind == "lost" and one.verdict.text.startswith(f"{zero.name(0)} is gone")


def test_a_rank_that_never_comes_is_not_waited_for_without_end(job):
    zero, one = job(2)
    until(lambda: zero.states)
    zero.world, zero.start_seconds = 4, 0.2
    zero._await_all()
    assert zero.verdict.kind == "lost" and zero.verdict.text.startswith("rank 2 and 1 more did not appear within 0.2 s")
    until(lambda: one.verdict)


def test_strangers_get_no_answer_and_disturb_nobody(job):
    zero, one = job(2)
    port = int(zero.endpoint.split()[0])
    hello = json.dumps({"token": "guess", "rank": 1, "kind": "beat", "state": {"host": "x", "pid": 1}}).encode()
    for data in (messages.LENGTHS.pack(len(hello), 0) + hello, b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(data)
            stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(PATIENCE)
            assert stranger.recv(100) == b""
    with socket.create_connection(("127.0.0.1", port)) as stranger:  # who announces a long message is not listened to
        stranger.sendall(messages.LENGTHS.pack(10, module.LONGEST_HELLO))
        stranger.settimeout(module.HELLO_SECONDS / 2)
        assert stranger.recv(100) == b""
    zero.own["now"] = 1
    until(lambda: one.states.get(0, {}).get("now") == 1)
    assert zero.states[1]["host"] == one.own["host"] and zero.verdict is None


def test_questions_are_answered_beside_the_beats(job):
    zero, one, two = job(3)
    data = random.randbytes(3_000_000)
    zero.services["echo"] = lambda rank, what, found: ({"rank": rank, **what}, found[::-1])

    def refuses(rank, what, found):
        raise UserError("not for you")

    zero.services["refuses"] = refuses
    assert one.ask("echo", data, n=3) == ({"rank": 1, "n": 3}, data[::-1])
    assert two.ask("echo", b"ab") == ({"rank": 2}, b"ba")
    with pytest.raises(UserError, match=r"rank 0 .*: not for you"):
        one.ask("refuses")
    with pytest.raises(UserError, match="not ready"):
        one.ask("unknown")
    assert one.ask("echo") == ({"rank": 1}, b"")
