"""Starts the job of two processes that runs the checks of `ds_llm.verify.sharded`, and reads its results."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from ds_llm.verify.report import BROKEN, Row

if TYPE_CHECKING:
    from ds_llm.verify.subject import Subject

PATIENCE = 300.0  # seconds without a new row: a process waits for one that failed alone
PROCESSES = 2
CASES = {
    **{f"ZeRO {stage} on two processes = plain torch": (f"zero={stage}",) for stage in range(4)},
    "experts on two processes = on one": ("zero=2", "parallel.expert=2"),
    "rows on two processes = on one": ("zero=2", "parallel.sequence=2"),
}
SUBJECT, ROWS, LOG = "subject.pickle", "rows.jsonl", "log.txt"  # files of the job's folder
ERROR = re.compile(r"(\[rank\d+\]:\s*)?(error: |[\w.]*(Error|Exception)\b)")
NOT_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Job:
    """The job of two processes for a subject, a context manager. The caller's block runs beside it."""

    def __init__(self, subject: Subject):
        self._scratch = tempfile.TemporaryDirectory()
        self._folder = Path(self._scratch.name)
        (self._folder / SUBJECT).write_bytes(pickle.dumps(subject))

    def __enter__(self) -> Job:
        environment = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        with open(self._folder / LOG, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *launcher, "-m", "ds_llm.verify.worker", str(self._folder)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_) -> None:
        if self._process.poll() is None:
            family = [psutil.Process(self._process.pid)]
            family += family[0].children(recursive=True)  # the launcher gives each a process group of its own
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()
        self._scratch.cleanup()

    def rows(self) -> Iterator[Row]:
        """Yield the rows of `CASES`, each as soon as the job has written it."""
        left = list(CASES)
        for found in self._lines():
            left.remove(found["name"])
            yield Row(**found)
        reason = self._problem() if left else ""
        for name in left:
            yield Row(name, BROKEN, reason)

    def _lines(self) -> Iterator[dict]:
        path, seen, last = self._folder / ROWS, 0, time.monotonic()
        while True:
            ended = self._process.poll() is not None  # before reading, so that nothing is missed
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            whole = text.split("\n")[:-1]
            for line in whole[seen:]:
                last = time.monotonic()
                yield json.loads(line)
            seen = len(whole)
            if ended or time.monotonic() - last > PATIENCE:
                return
            time.sleep(0.1)

    def _problem(self) -> str:
        if self._process.poll() is None:
            return f"the job of two processes found nothing for {PATIENCE:.0f} s"
        log = (self._folder / LOG).read_text(errors="replace")
        errors = [line.strip() for line in log.splitlines() if ERROR.match(line)]
        return f"the job of two processes failed: {errors[0] if errors else f'exit code {self._process.returncode}'}"
