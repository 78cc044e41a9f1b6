"""Runs steps one after the other, each as a process group with a limit, and keeps what they find."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.gpu_check import markdown
from benchmarks.gpu_check.install import ROOT, SITE
from benchmarks.gpu_check.report import FAILED, NOT_INSTALLED, OK, TIMED_OUT, Place
from benchmarks.gpu_check.steps import WHEELS, Step
from ds_llm.errors import UserError

NO_TIME, RUNNING = "no time left", "running"
LEAST_SECONDS = 10.0  # with less left, no step is begun
LAST_LINES = 12  # of a failed step's output that go into the results
POLL_SECONDS = 0.1


class Results:
    """`results.json` of a folder, and the same as `results.md`, both whole at any time; `log` takes the steps' output.

    Raises `UserError` when the folder cannot be written, another check works in it, or it holds results of the other
    kind (real, dry run).
    """

    def __init__(self, folder: Path, dry_run: bool):
        self.path, self.log = folder / "results.json", folder / "log.txt"
        self.content = {"dry_run": dry_run, "steps": {}}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._held = open(self.log, "ab")  # noqa: SIM115 (as long as this object lives)
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.path.exists():
                self.content = json.loads(self.path.read_text())
                kind, steps = self.content["dry_run"], self.content["steps"]
                assert isinstance(steps, dict)
        except BlockingIOError:
            raise UserError(f"--out: {folder}: another check works there; wait for it or name another folder") from None
        except OSError as error:
            raise UserError(f"--out: {folder}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AssertionError):
            raise UserError(f"--out: {self.path}: is no result of this check; name another folder") from None
        if self.content["steps"] and kind != dry_run:
            held = "a dry run" if kind else "a real run"
            raise UserError(f"--out: {folder}: holds results of {held}; name another folder")
        self.save()

    def ended_well(self, name: str) -> bool:
        return self.content["steps"].get(name, {}).get("status") == OK

    def put(self, name: str, entry: dict) -> None:
        self.content["steps"][name] = entry
        self.save()

    def save(self) -> None:
        for path, text in (
            (self.path, json.dumps(self.content, indent=1) + "\n"),
            (self.path.with_suffix(".md"), markdown.page(self.content)),
        ):
            partial = path.with_name(f".{path.name}.partial")
            try:
                partial.write_text(text)
                os.replace(partial, path)
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def environment(place: Place) -> dict[str, str]:
    """Of the steps: this checkout and the installed wheels come first, nothing is fetched."""
    path = [str(place.scratch / SITE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONSAFEPATH": "1",  # the folder of a module or script does not come before these
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_LLM_CACHE": str(place.scratch / "cache"),
    }
    if place.toy:
        own |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return os.environ | own


def run(step: Step, results: Results, place: Place, commit: str | None, limit: float) -> str:
    """Run a step to its end or its limit (s); returns its status. What it found by then stands in the results."""
    began, part, log = time.monotonic(), place.scratch / f"{step.name}.json", results.log
    part.unlink(missing_ok=True)
    entry = {"status": RUNNING, "what": step.what, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    entry |= {"commit": commit, "limit_s": round(limit, 1)}
    results.put(step.name, entry)
    command = [sys.executable, "-m", "benchmarks.gpu_check.step", step.name]
    command += ["--part", str(part), "--scratch", str(place.scratch)]
    command += ["--dry-run"] * place.toy + (["--wheels", str(place.wheels)] if step is WHEELS else [])
    with open(log, "ab") as output:
        output.write(f"\n===== {step.name}, {entry['date']}\n".encode())
        output.flush()
        start, seen = output.tell(), None
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(place), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None and time.monotonic() - began < limit:
                time.sleep(POLL_SECONDS)
                if part.exists() and (changed := part.stat().st_mtime_ns) != seen:
                    seen = changed
                    results.put(step.name, entry | json.loads(part.read_text()))
        finally:
            code = process.poll()
            end_group(process)
    if part.exists():
        entry |= json.loads(part.read_text())
    if code is None:
        entry["status"], entry["error"] = TIMED_OUT, f"ended after {limit:.0f} s"
    elif code:
        entry["status"], entry["error"] = FAILED, last_lines(log, start) or f"exit code {code}, no output"
    elif entry["status"] != NOT_INSTALLED:
        entry["status"] = OK
    entry["seconds"] = round(time.monotonic() - began, 1)
    results.put(step.name, entry)
    return entry["status"]


def end_group(process: subprocess.Popen) -> None:
    """SIGKILL what is left of a step: its own processes may outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(log: Path, start: int) -> str:
    with open(log, "rb") as file:
        file.seek(start)
        lines = [line.rstrip() for line in file.read().decode(errors="replace").splitlines()]
    return "\n".join([line for line in lines if line][-LAST_LINES:])
