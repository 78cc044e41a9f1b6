"""Pretraining: speed, memory against the plan, what the device does in a step, and a kill with a bitwise comparison."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu_check import inputs, traced
from benchmarks.gpu_check.report import Place, Report
from benchmarks.run_results import trained
from ds_llm import hardware
from ds_llm.config import run as config
from ds_llm.tracking import metrics_file as metrics

GPU_DATA = {"words": 32000, "documents": 8000, "length": 700}
TOY_DATA = {"words": 512, "documents": 60, "length": 100}
KILL_STEPS, SAVE_EVERY, KILL_AT = 24, 8, 11  # steps of the run that is killed, its checkpoints, the step of the kill
QUIET = ["tracking.log_every=1", "tracking.report=false", "tracking.tensorboard=false", "checkpoint.every_epoch=false"]


@dataclass(frozen=True)
class Run:
    """keys: of the run on a GPU; toy: what a dry run has instead; cut: what the killed run changes, so that its
    checkpoints are small; steps, warmup, profiled: the last `profiled` of `steps` are traced, those between timed."""

    keys: tuple[str, ...]
    toy: tuple[str, ...]
    cut: tuple[str, ...] = ()
    steps: int = 24
    warmup: int = 6
    profiled: int = 3


TOY = ("model.dim=64", "model.n_layers=2", "model.n_heads=4", "model.max_seq_len=64", "train.batch_size=2")
EXPERTS = ("model.use_moe=true", "model.n_routed_experts=64", "model.num_experts_per_tok=8")
DENSE = Run(
    ("model.dim=2048", "model.n_layers=24", "model.n_heads=16", "model.max_seq_len=4096", "train.batch_size=4"),
    TOY,
    cut=("model.n_layers=2",),
)
SMALL = Run(
    (
        "model.dim=768",
        "model.n_layers=12",
        "model.n_heads=12",
        "model.max_seq_len=512",
        "train.batch_size=32",
        "zero=1",
    ),
    (*TOY, "zero=1"),
    steps=60,
    warmup=15,
    profiled=5,
)
MIXTURE = Run(
    ("model.dim=1024", "model.n_layers=8", "model.n_heads=16", "model.n_kv_heads=4", "model.max_seq_len=2048",
     "train.batch_size=8", "model.moe_intermediate_size=512", *EXPERTS),
    (*TOY, "model.moe_intermediate_size=16", *EXPERTS),
    cut=("model.n_layers=2",),
)  # fmt: skip


def dense(report: Report, place: Place) -> None:
    check(DENSE, report, place)


def small(report: Report, place: Place) -> None:
    check(SMALL, report, place)


def experts(report: Report, place: Place) -> None:
    check(MIXTURE, report, place)


def check(run: Run, report: Report, place: Place) -> None:
    sizes = TOY_DATA if place.toy else GPU_DATA
    data = inputs.token_file(place.scratch, **sizes)
    keys = ["mode=pretrain", f"data.train={data}", f"model.vocab_size={sizes['words']}", "train.dtype=bf16"]
    keys += ["optim.lr=1e-4", *QUIET, *(run.toy if place.toy else run.keys)]
    folder = place.scratch / report.path.stem
    keys += [f"train.activation_checkpointing={str(planned(keys, report)).lower()}"]
    try:
        speed(run, keys, report, folder)
    except OutOfMemory:
        if keys[-1].endswith("true"):
            raise
        report.figures(out_of_memory="without recomputation, which the plan says fits")
        keys[-1] = "train.activation_checkpointing=true"
        plan_bytes(keys, report, recompute=True)
        speed(run, keys, report, folder)
    killed([*keys, *(() if place.toy else run.cut)], report, folder, cut=bool(run.cut) and not place.toy)


class OutOfMemory(Exception):
    """The device has too little memory."""


def planned(keys: list[str], report: Report) -> bool:
    """Whether layers must be recomputed on this card by the plan; reports the plan."""
    if not torch.cuda.is_available():
        plan_bytes(keys, report, recompute=False)
        return False
    card = torch.cuda.get_device_properties(0).total_memory
    recompute = plan_bytes(keys, report, recompute=False) > 0.92 * card
    if recompute:
        plan_bytes(keys, report, recompute=True)
    return recompute


def plan_bytes(keys: list[str], report: Report, recompute: bool) -> int:
    """What `--plan` says of a run, in bytes; reported in GB (10^9 bytes)."""
    from ds_llm.memory.plan import Planner, Setting

    settings = config.load(None, keys)
    planner = Planner(settings, 1, touched=not torch.cuda.is_available())
    total = planner.estimate(Setting(settings.zero, False, recompute)).total
    report.figures(parameters=planner.outline.parameters, zero=settings.zero, recompute=recompute, plan_gb=total / 1e9)
    return total


def speed(run: Run, keys: list[str], report: Report, folder: Path) -> None:
    """Tokens per second, share of the peak (MFU), memory, idle share and the longest kernels."""
    out, trace = folder / "speed", folder / "trace.json"
    first = run.steps - run.profiled + 1
    keys = [*keys, f"output={out}", f"train.max_steps={run.steps}", "checkpoint.last=false", "checkpoint.best=false"]
    keys += ["checkpoint.every_steps=0", "resume=never"]
    if out.exists():  # of the try that ran out of memory
        out.rename(folder / "out-of-memory")
    process = traced.start(keys, {"first": first, "steps": run.profiled, "out": str(trace)})
    process.join()
    records = metrics.read(out / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "step"]
    if process.exitcode == traced.OUT_OF_MEMORY:
        raise OutOfMemory(f"out of memory in step {len(steps) + 1}")
    if process.exitcode:
        sys.exit(f"error: the run ended with exit code {process.exitcode}, see log.txt")
    begun = next(r for r in records if r.get("event") == "start")
    tokens = begun["global_batch"] * begun["seq_len"]
    seconds = statistics.median(r["step_time"] for r in steps[run.warmup : first - 2])
    peak = hardware.peak_flops(hardware.device_name(), "bf16")
    memory = max(r["memory_gb"] for r in steps)
    report.figures(
        tokens_per_step=tokens,
        step_ms=1e3 * seconds,
        tokens_per_s=tokens / seconds,
        mfu=peak and begun["flops_per_token"] * tokens / seconds / peak,
        memory_gb=memory,
        memory_of_plan=memory / report.content["figures"]["plan_gb"],
        first_loss=steps[0]["loss"],
        last_loss=steps[-1]["loss"],
    )
    found = json.loads(trace.read_text())
    report.figures(idle_share=found["idle_share"], profiled_steps=found["steps"])
    for row in found["longest"]:
        report.row("longest kernels", **row)


def killed(keys: list[str], report: Report, folder: Path, cut: bool) -> None:
    """SIGKILL a run between two checkpoints, continue it, and compare bit by bit with one that nothing disturbed.

    Both are begun at once. What differs before the kill already is not the continuation's: then the kernels give other
    bits from one run to the next.
    """
    keys = [*keys, f"train.max_steps={KILL_STEPS}", f"checkpoint.every_steps={SAVE_EVERY}", "checkpoint.keep=1"]
    whole, other = folder / "whole", folder / "killed"
    undisturbed = traced.start([*keys, f"output={whole}"])
    victim = traced.start([*keys, f"output={other}"])
    while victim.is_alive() and steps_of(other) < KILL_AT:
        time.sleep(0.002)
    os.kill(victim.pid, signal.SIGKILL) if victim.is_alive() else None
    victim.join()
    before, at = metrics.deterministic(metrics.read(other / "metrics.jsonl")), steps_of(other)
    if victim.exitcode != -signal.SIGKILL:
        sys.exit(f"error: the run to kill ended by itself with exit code {victim.exitcode} at step {at}, see log.txt")
    undisturbed.join()
    again = traced.start([*keys, f"output={other}"])
    again.join()
    for name, process in (("undisturbed", undisturbed), ("continued", again)):
        if process.exitcode:
            sys.exit(f"error: the {name} run ended with exit code {process.exitcode}, see log.txt")
    events = [r for r in metrics.read(other / "metrics.jsonl") if r.get("event") == "resume"]
    one, two = trained(whole, KILL_STEPS), trained(other, KILL_STEPS)
    differ = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    losses = [(a["loss"], b["loss"]) for a, b in zip(one["metrics"], two["metrics"], strict=True) if "loss" in a]
    report.figures(
        killed_model="2 layers" if cut else "whole",
        killed_at_step=at,
        continued_from_step=events[0]["step"],
        equal_before_the_kill=one["metrics"][: len(before)] == before,
        equal_to_the_bit=not differ,
        what_differs=differ[:5],
        compared=len(one),
        largest_loss_difference=max(abs(a - b) / abs(a) for a, b in losses),
    )


def steps_of(out: Path) -> int:
    return max((r["step"] for r in metrics.read(out / "metrics.jsonl") if r["kind"] == "step"), default=0)
