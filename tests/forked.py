"""Jobs of several processes that start within a second: forked from a server that has imported the libraries.

A process spends seconds on importing torch, DeepSpeed and transformers, and each test would pay them for every process
of every job. The server has imported them once for all tests. The processes are real and meet by torch.distributed as
under `torchrun`; the launchers themselves are what `multirank/test_launch.py` starts.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from ds_llm import cli

PRELOADED = (  # nothing of ds_llm: its modules look at the environment when they are imported
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported, with torch's compiler, by every engine
    "torch._dynamo",
    "torch.utils.cpp_extension",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
    "transformers.generation",
    "triton",
    "peft",
    "safetensors.torch",
    "omegaconf",
    "pyarrow",
    "rich.progress",
    "rich.table",
    "psutil",
)


class Job:
    """A running job; the part of `subprocess.Popen` that tests use. `pid` is the number of its process group too."""

    def __init__(self, processes: int, arguments: list[str], env: dict[str, str]):
        self.args = arguments
        self._folder = Path(tempfile.mkdtemp(prefix="forked-"))
        for name in ("out", "err"):  # there also when the job is ended before it opens them
            (self._folder / name).touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        with mock.patch.dict(os.environ, env, clear=True), warnings.catch_warnings():
            cli.quiet()  # the libraries look at these settings when they are imported
            forkserver.ensure_running()
        self._leader = context.Process(target=_lead, args=(processes, arguments, env, self._folder))
        self._leader.start()
        self.pid = self._leader.pid

    @property
    def returncode(self) -> int | None:
        return self._leader.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and error of all processes, after the end of the job."""
        self._leader.join(timeout)
        if self._leader.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        found = tuple((self._folder / name).read_text() for name in ("out", "err"))
        shutil.rmtree(self._folder)
        return found


def _lead(processes: int, arguments: list[str], env: dict[str, str], folder: Path) -> None:
    """What a launcher does: start the ranks, pass signals on, end all when one fails; exits with its code."""
    patience = 60  # seconds that the others get to end by themselves
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    doors, ranks = [], set()
    for rank in range(processes):
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            _rank(rank, processes, arguments, read)
        doors.append(write)
        ranks.add(pid)

    def tell(number: int, *_) -> None:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    signal.signal(signal.SIGTERM, tell)
    signal.signal(signal.SIGALRM, lambda *_: tell(signal.SIGKILL))
    from torch.distributed import TCPStore

    # made behind the forks, because it has threads; it chooses the port itself, so that no other job can take it
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for door in doors:
        os.write(door, str(store.port).encode())
        os.close(door)
    code = 0
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            tell(signal.SIGTERM)
            signal.alarm(patience)
    os._exit(code if code >= 0 else 128 - code)


def _rank(rank: int, processes: int, arguments: list[str], door: int) -> None:
    code = 1
    gc.freeze()  # DeepSpeed collects garbage again and again: without what the libraries hold, that takes no time
    try:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.read(door, 9).decode()}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
