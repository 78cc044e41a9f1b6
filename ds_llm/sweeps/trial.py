"""One trial: a process of `launch/train.py` in its own folder, followed through its metrics file."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections import deque
from pathlib import Path

import psutil

from ds_llm.distributed.interrupt import since_boot
from ds_llm.sweeps.file import Metric
from ds_llm.tracking.metrics_file import FILE

LOG = "log.txt"  # what the process prints, in the trial's folder
SMOOTHED = 20  # steps that the value of a training metric is the mean of
# lines that say what went wrong: ours, and the last one of a traceback
_ERROR = re.compile(r"^(\[rank\d+\]:\s*)?(error: |[\w.]*(Error|Exception|Interrupt)\b)")


class Follower:
    """The values of a metric in a growing metrics file; the file may be cut and rewritten by a continued run.

    values: by iteration, from 1; an iteration is an evaluation during training, or a step with the mean of the last
    `SMOOTHED` steps. best: the run's result: its best evaluation (whose checkpoint is its model), or its last value.
    """

    def __init__(self, folder: Path, metric: Metric):
        self.path, self.metric = folder / FILE, metric
        self._reset()

    def _reset(self) -> None:
        self._inode, self._offset = None, 0
        self._recent: deque[float] = deque(maxlen=SMOOTHED)
        self.values: dict[int, float] = {}
        self.step, self.fields = 0, set()

    def update(self) -> list[int]:
        """Read the records since the last call. Returns their iterations."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return []
        if status.st_ino != self._inode or status.st_size < self._offset:
            self._reset()
            self._inode = status.st_ino
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            lines = file.read().split(b"\n")
        self._offset += sum(len(line) + 1 for line in lines[:-1])  # the last one may still be being written
        before = len(self.values)
        for line in lines[:-1]:
            if line.strip():
                self._take(json.loads(line))
        return list(range(before + 1, len(self.values) + 1))

    def _take(self, record: dict) -> None:
        if record["kind"] in ("step", "eval"):
            self.step = record["step"]
        if record["kind"] != self.metric.kind or record.get("step", 0) == 0:
            return  # an evaluation before training says nothing about the trial
        self.fields |= record.keys()
        value = record.get(self.metric.field)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return
        if self.metric.kind == "step":
            self._recent.append(value)
            value = sum(self._recent) / len(self._recent)
        self.values[len(self.values) + 1] = value

    @property
    def best(self) -> float | None:
        if not self.values:
            return None
        if self.metric.kind == "step":
            return self.values[len(self.values)]
        return (min if self.metric.minimize else max)(self.values.values())


class TrialProcess:
    """A running trial. words: its command. gpus: its CUDA_VISIBLE_DEVICES; None leaves it as it is."""

    def __init__(self, number: int, folder: Path, words: list[str], metric: Metric, gpus: str | None, share: int):
        self.number, self.folder, self.gpus = number, folder, gpus
        self.follower = Follower(folder, metric)
        self.ending: str | None = None  # why it was asked to end early
        folder.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
        if gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        elif share > 1 and "OMP_NUM_THREADS" not in environment:  # trials beside each other on the same cores
            environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // share))
        with open(folder / LOG, "ab") as log:
            log.write(f"$ {' '.join(words)}\n".encode())
            self._from = log.tell()
            # a session of its own: Ctrl-C reaches the sweep alone, which then asks its trials
            self.process = subprocess.Popen(
                with_port(words),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def identity(self) -> list[float]:
        """Number and start time of the process, by which a continued sweep recognises it."""
        return [self.process.pid, since_boot(psutil.Process(self.process.pid))]

    def end(self, reason: str) -> None:
        """Ask the trial to save and stop, which may take a while."""
        if self.ending is None:
            self.ending = reason
            self.process.send_signal(signal.SIGTERM)

    def last_error(self) -> str:
        """The line of the process's output with the error."""
        code = self.process.returncode
        with open(self.folder / LOG, "rb") as log:
            log.seek(self._from)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR.match(line)]
        if code < 0:
            return f"killed by {signal.Signals(-code).name}" + (f" after: {lines[-1]}" if lines else "")
        # ours first: a launcher that started several processes ends with tracebacks of its own
        own = [line for line in errors if line.startswith("error: ")]
        found = (own or errors or lines or ["it printed nothing"])[-1]
        return f"{found.removeprefix('error: ')} (exit code {code})"


def end_orphan(identity: list[float]) -> bool:
    """Ask a trial that outlived its sweep to save and stop. Returns whether it was still running."""
    try:
        process = psutil.Process(int(identity[0]))
        if abs(since_boot(process) - identity[1]) > 2 or process.status() == psutil.STATUS_ZOMBIE:
            return False
        family = [process, *process.children(recursive=True)]
        process.terminate()
    except psutil.NoSuchProcess:
        return False
    psutil.wait_procs(family)
    return True


def with_port(words: list[str]) -> list[str]:
    """The command with a free port for the `deepspeed` launcher, so that trials on one machine do not collide."""
    place = next((i for i, word in enumerate(words[:3]) if Path(word).name in ("deepspeed", "ds")), None)
    if place is None or any("master_port" in word for word in words):
        return words
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [*words[: place + 1], "--master_port", str(port), *words[place + 1 :]]
