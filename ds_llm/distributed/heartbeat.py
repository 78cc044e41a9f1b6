"""Heartbeats of all ranks to rank 0 over TCP.

Every `BEAT_SECONDS` each rank sends rank 0 what it is doing. Rank 0 answers with its own state and with the reason to
end the job, if there is one. A rank ends the job for all when its connection breaks, when it reports a failure, or when
it is silent for too long: rank 0 notices and tells the others, and the others notice the same of rank 0. This needs no
shared folder, and it works while the main thread is stuck in a collective.

Messages are those of `ds_llm.distributed.messages`. Rank 0 listens on a port of its own choice; port and a secret reach
the others through the store of torch.distributed at MASTER_ADDR:MASTER_PORT. Rank 0 does not answer without the secret.
"""

from __future__ import annotations

import contextlib
import hmac
import itertools
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

from ds_llm.distributed.messages import Silence, listen, receive, send
from ds_llm.errors import UserError

BEAT_SECONDS = 1.0
START_SECONDS = 300.0  # within which all ranks of a launch must appear
LATE_SECONDS = 10.0  # for which a failed rank 0 waits for ranks that are still starting
HELLO_SECONDS = 10.0  # within which a new connection must identify itself
LONGEST_HELLO = 1 << 16  # bytes of a first message, from a connection not yet trusted
FAILED = "failed: "  # a failed rank 0 stores this and the reason instead of its endpoint
_meetings = itertools.count()  # numbers the jobs that one process runs one after the other


@dataclass
class Verdict:
    """Why the job must end.

    kind: lost, failed or hang. rank: the rank at fault. text: one line. own: this rank found it and must report it;
    false: rank 0 told it.
    """

    kind: str
    rank: int
    text: str
    own: bool = True


class Peers:
    """The other processes of the job, as this one sees them. Background threads update it from `start` to `leave`.

    lost_seconds: a rank that is silent for longer counts as lost. own: the state that this rank sends, any JSON object.
    states: the latest `own` of each known rank (rank 0 knows all ranks, the others know rank 0). verdict: why the job
    must end, None as long as it need not. services: on rank 0, name -> function(rank, object, bytes) ->
    (object, bytes) that answers `ask`.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        lost_seconds: float = 120.0,
        meet: Callable[[str | None], str] | None = None,
        start_seconds: float | None = None,
    ):
        self.rank, self.world, self.lost_seconds = rank, world, lost_seconds
        self.start_seconds = START_SECONDS if start_seconds is None else start_seconds
        self.own: dict = {"host": socket.gethostname(), "pid": os.getpid()}
        self.states: dict[int, dict] = {}
        self.services: dict[str, Callable] = {}
        self.verdict: Verdict | None = None
        self._heard: dict[int, float] = {}
        self._left: set[int] = set()
        self._silenced: set[int] = set()
        self._told: set[int] = set()  # ranks that know the verdict
        self._meet = meet or self._by_store
        self._wake, self._over, self._judged = threading.Event(), threading.Event(), threading.Lock()
        self._bye: dict | None = None
        self._asking, self._ask_lock = None, threading.Lock()
        self._store = self._server = None

    def start(self) -> None:
        """Open the connections. Raises `UserError` where rank 0 cannot be reached or its port is taken."""
        if self.rank == 0:
            self._token = secrets.token_hex(16)
            self._server = listen(self._serve)
            threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
            self._meet(f"{self._server.server_address[1]} {self._token}")
            self._thread = threading.Thread(target=self._await_all, daemon=True)
        else:
            port, self._token = _endpoint(self._meet(None))
            self._port = int(port)
            self._connection = self._connect("beat")
            self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def leave(self, failed: str | None = None) -> None:
        """Leave the job. failed: why this rank failed, which ends the job for the others; None: it is done.

        Rank 0 stays until every other rank has left or knows why the job ends.
        """
        if self.rank:
            self._bye = {"failed": failed}
            self._wake.set()
            self._thread.join(2 * HELLO_SECONDS)
        else:
            patience = 3 * BEAT_SECONDS
            if failed is not None and self.verdict is None:
                self._judge("failed", 0, f"{self.name(0)} failed: {failed}")
                patience += LATE_SECONDS
                if self._store is not None:  # for ranks that start later still
                    with contextlib.suppress(RuntimeError):
                        self._store.set(self._key, FAILED + self.verdict.text)
            end = time.monotonic() + patience
            while len(self._left | self._told) + self._late() < self.world - 1:
                if self.verdict is not None and time.monotonic() > end:
                    break
                time.sleep(BEAT_SECONDS / 20)
            self._over.set()
            self._server.shutdown()
            self._server.server_close()
        self._over.set()

    def poke(self) -> None:
        """Send a changed `own` at once."""
        self._wake.set()

    def name(self, rank: int) -> str:
        """`rank 3 (host, process 123)`; of an unknown rank only its number."""
        state = self.own if rank == self.rank else self.states.get(rank)
        return f"rank {rank} ({state['host']}, process {state['pid']})" if state else f"rank {rank}"

    def silent(self, rank: int) -> float:
        """Seconds since the latest message of a rank."""
        return time.monotonic() - self._heard.get(rank, time.monotonic())

    def stuck(self) -> set[int]:
        """On rank 0: ranks that are connected but silent."""
        present = set(self.states) - self._left
        return self._silenced | {number for number in present if self.silent(number) > 4 * BEAT_SECONDS}

    def end(self, kind: str, text: str) -> None:
        """On rank 0: end the job for all."""
        self._judge(kind, self.rank, text)

    def ask(self, service: str, data: bytes = b"", **request) -> tuple[dict, bytes]:
        """The answer of a service of rank 0. Raises `UserError` where it fails or rank 0 cannot be reached."""
        with self._ask_lock:
            try:
                if self._asking is None:
                    self._asking = self._connect("ask")
                send(self._asking, {"service": service, **request}, data)
                answer, found = receive(self._asking, self.lost_seconds)
            except (OSError, Silence) as error:
                raise UserError(f"{self.name(0)} does not answer ({error})", any_rank=True) from None
        if "error" in answer:
            raise UserError(f"{self.name(0)}: {answer['error']}", any_rank=True)
        return answer, found

    # -- the meeting --------------------------------------------------------------------------------------------------

    def _by_store(self, endpoint: str | None) -> str:
        """Share rank 0's endpoint through the store at MASTER_ADDR:MASTER_PORT."""
        from torch import distributed as dist

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            self._store = dist.TCPStore(
                address,
                port,
                is_master=self.rank == 0 and not agent,
                timeout=timedelta(seconds=self.start_seconds),
                wait_for_workers=False,
                multi_tenant=True,  # the process group uses the same one
            )
            self._key = f"ds_llm/peers/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_meetings)}"
            if endpoint is not None:
                self._store.set(self._key, endpoint)
            found = self._store.get(self._key).decode()
            if found.startswith(FAILED):
                self._store.add(f"{self._key}/late", 1)
            return found
        except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
            if "EADDRINUSE" in str(error):
                raise port_in_use() from None
            raise UserError(
                f"rank {self.rank} on {socket.gethostname()} did not find rank 0 at {address}:{port} within "
                f"{self.start_seconds:g} s: did it start, and does this machine reach that address and port?",
                any_rank=True,
            ) from None

    def _late(self) -> int:
        """On rank 0: how many ranks started after it had failed and read that it failed."""
        with contextlib.suppress(RuntimeError):
            if self.verdict is not None and self._store is not None:
                return self._store.add(f"{self._key}/late", 0)
        return 0

    def _connect(self, kind: str) -> socket.socket:
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        try:
            connection = socket.create_connection((address, self._port), timeout=HELLO_SECONDS)
        except OSError as error:
            if self._store is not None:
                with contextlib.suppress(RuntimeError):
                    _endpoint(self._store.get(self._key).decode())
            raise UserError(
                f"rank {self.rank} on {socket.gethostname()} cannot connect to rank 0 at {address}:{self._port} "
                f"({error.strerror or error}); ports between the machines of a job must be open",
                any_rank=True,
            ) from None
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        send(connection, {"token": self._token, "rank": self.rank, "kind": kind, "state": dict(self.own)})
        return connection

    # -- rank 0 -------------------------------------------------------------------------------------------------------

    def _await_all(self) -> None:
        begin = time.monotonic()
        while len(self.states) < self.world - 1 and not self._over.wait(BEAT_SECONDS):
            if time.monotonic() - begin > self.start_seconds:
                missing = [number for number in range(1, self.world) if number not in self.states]
                others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                self._judge(
                    "lost",
                    missing[0],
                    f"rank {missing[0]}{others} did not appear within {self.start_seconds:g} s: was it started, and "
                    "does its machine reach this one?",
                )
                return

    def _serve(self, connection: socket.socket) -> None:
        try:
            hello, _ = receive(connection, HELLO_SECONDS, LONGEST_HELLO)
            if not hmac.compare_digest(str(hello.get("token")), self._token):
                return
            rank = int(hello["rank"])
        except (OSError, Silence, ValueError, KeyError, TypeError):
            return  # a stranger
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hello["kind"] == "ask":
            with contextlib.suppress(OSError, Silence):
                self._answer(rank, connection)
            return
        self.states[rank], self._heard[rank] = hello["state"], time.monotonic()
        try:
            while True:
                found, _ = receive(connection, self.lost_seconds)
                self._heard[rank] = time.monotonic()
                if "bye" in found:
                    self._left.add(rank)
                    if found["bye"]["failed"] is not None:
                        self._judge("failed", rank, f"{self.name(rank)} failed: {found['bye']['failed']}")
                    send(connection, {})
                    return
                self.states[rank] = found["state"]
                verdict = self.verdict
                send(connection, {"state": dict(self.own), "verdict": asdict(verdict) if verdict else None})
                if verdict:
                    self._told.add(rank)
        except (OSError, Silence, ValueError) as error:
            self._judge_gone(rank, error)
            self._left.add(rank)
            if isinstance(error, Silence):
                self._silenced.add(rank)

    def _answer(self, rank: int, connection: socket.socket) -> None:
        while True:
            request, data = receive(connection, None)
            try:
                answer, found = self.services[request.pop("service")](rank, request, data)
            except KeyError:
                answer, found = {"error": "not ready"}, b""
            except (UserError, OSError) as error:
                answer, found = {"error": str(error)}, b""
            send(connection, answer, found)

    # -- the other ranks ----------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        connection = self._connection
        try:
            while True:
                bye = self._bye
                send(connection, {"bye": bye} if bye else {"state": dict(self.own)})
                told, _ = receive(connection, self.lost_seconds)
                if bye:
                    return
                self.states[0], self._heard[0] = told["state"], time.monotonic()
                if told["verdict"] and self.verdict is None:
                    self.verdict = Verdict(**{**told["verdict"], "own": False})
                self._wake.wait(BEAT_SECONDS)
                self._wake.clear()
        except (OSError, Silence, ValueError) as error:
            if self._bye is None or self._bye["failed"] is not None:
                self._judge_gone(0, error)
        finally:
            connection.close()

    # -- verdicts -----------------------------------------------------------------------------------------------------

    def _judge_gone(self, rank: int, error: Exception) -> None:
        state = self.states.get(rank, {})
        last = f"; last seen in {state['doing']}" if state.get("doing") else ""
        if isinstance(error, Silence):
            reason = (
                f"gave no sign of life for {self.lost_seconds:g} s (its machine or network is down, or it was stopped)"
            )
        else:
            reason = "is gone (killed, as for want of memory, or its machine went down)"
        self._judge("lost", rank, f"{self.name(rank)} {reason}{last}")

    def _judge(self, kind: str, rank: int, text: str) -> None:
        with self._judged:
            if self.verdict is None and not self._over.is_set():
                self.verdict = Verdict(kind, rank, text)


def _endpoint(told: str) -> list[str]:
    """Port and secret of rank 0. Raises `UserError` where rank 0 has failed; rank 0 has printed that error itself."""
    if told.startswith(FAILED):
        error = UserError(told.removeprefix(FAILED))
        error.said = True
        raise error
    return told.split()


def port_in_use() -> UserError:
    """The error where another job uses MASTER_PORT."""
    return UserError(
        f"port {os.environ['MASTER_PORT']}: another job on this machine uses it; choose another one, for example "
        "deepspeed --master_port 29600 ... (torchrun: --master-port)",
        any_rank=True,
    )
