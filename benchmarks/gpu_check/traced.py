"""Runs of `launch/train.py` in processes of their own, some of whose steps `torch.profiler` watches."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch

from benchmarks.gpu_check.install import ROOT

PRELOADED = ("deepspeed", "torch._dynamo", "transformers.modeling_utils", "transformers.models.llama.modeling_llama",
             "peft", "omegaconf", "ds_llm.cli")  # fmt: skip
LONGEST = 10  # kernels that are named
OUT_OF_MEMORY = 77  # exit code


def start(keys: list[str], trace: dict | None = None):
    """Start a training with these `key=value`; the process.

    trace: {"first": step, "steps": number, "out": path}: the steps that are traced, and where what was found goes.
    """
    # what has touched the GPU cannot be forked; without one, forks save the time of importing
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    process = context.Process(target=train, args=(keys, trace))
    process.start()
    return process


def train(keys: list[str], trace: dict | None) -> None:
    """Run `launch/train.py` in this process and leave with its exit code, or with `OUT_OF_MEMORY`."""
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # the profiler's own messages
    if trace is not None:
        watch(trace["first"], trace["steps"], Path(trace["out"]))
    sys.argv = [str(ROOT / "launch" / "train.py"), *keys]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except torch.OutOfMemoryError:
        traceback.print_exc()
        sys.exit(OUT_OF_MEMORY)


def watch(first: int, steps: int, out: Path) -> None:
    """Let the trainer's steps `first` to `first + steps - 1` be traced; writes `summary` of them to `out` (JSON)."""
    from ds_llm.train import trainer

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    def done(trace) -> None:
        found = summary(trace)
        found["idle_share"] = 1 - busy(found.pop("intervals"), *found["window"])
        del found["window"]
        out.write_text(json.dumps(found))

    # a step before them warms the profiler up
    plan = torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1)
    profiler = torch.profiler.profile(activities=activities, schedule=plan, on_trace_ready=done)

    class Tracker(trainer.Tracker):
        def step(self, metrics: dict) -> None:
            super().step(metrics)
            if metrics["step"] == first - 2:
                profiler.start()
            elif first - 2 < metrics["step"] < first + steps:
                profiler.step()
                if metrics["step"] == first + steps - 1:
                    profiler.stop()

    trainer.Tracker = Tracker


def summary(trace) -> dict:
    """Of a finished trace: {"window": (µs, µs) of the steps, "intervals": [(µs, µs)] in which the device worked,
    "steps", "longest": [{"kernel", "ms_per_step", "calls_per_step"}] of the ten that took most time together}.

    On a CPU the operators of torch stand for the kernels; there an operator's time is without those that it calls.
    """
    cuda = torch.profiler.ProfilerActivity.CUDA in trace.activities
    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    intervals, marks, time, calls = [], [], {}, {}
    for event in trace.events():
        span = (event.time_range.start, event.time_range.end)
        if event.name.startswith("ProfilerStep"):
            if event.device_type == torch.autograd.DeviceType.CPU:
                marks.append(span)
            continue
        if event.device_type != device or event.is_user_annotation:
            continue
        intervals.append(span)
        time[event.name] = time.get(event.name, 0.0) + (span[1] - span[0] if cuda else event.self_cpu_time_total)
        calls[event.name] = calls.get(event.name, 0) + 1
    steps = len(marks)
    longest = [
        {"kernel": name[:100], "ms_per_step": time[name] / steps / 1e3, "calls_per_step": calls[name] / steps}
        for name in sorted(time, key=time.get, reverse=True)[:LONGEST]
    ]
    window = (min(start for start, _ in marks), max(end for _, end in marks))
    return {"window": window, "intervals": intervals, "steps": steps, "longest": longest}


def busy(intervals: list[tuple[float, float]], start: float, end: float) -> float:
    """Share of the time from `start` to `end` that the intervals cover, overlaps counted once."""
    covered, reached = 0.0, start
    for begin, stop in sorted(intervals):
        begin, stop = max(begin, reached), min(stop, end)
        if stop > begin:
            covered += stop - begin
            reached = stop
    return covered / (end - start)
