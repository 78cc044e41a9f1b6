"""What runs only with packages that many machines lack: QLoRA, flash-attn in training, cuML."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks.gpu_check import inputs, traced
from benchmarks.gpu_check.finetune import GPU_MODEL, TOY_MODEL
from benchmarks.gpu_check.pretrain import GPU_DATA, QUIET, SMALL, TOY_DATA
from benchmarks.gpu_check.report import NotInstalled, Place, Report
from ds_llm.tracking import metrics_file as metrics

STEPS, WARMUP = 12, 4


def optional(report: Report, place: Place) -> None:
    """Each of `PARTS` whose package is installed; one that fails keeps back no other and fails the step at its end."""
    failed = []
    for name, package, run in PARTS:
        if find_spec(package) is None:
            report.row("parts", part=name, package=package, result="not installed")
            continue
        try:
            report.row("parts", part=name, package=package, result="ok", **run(place))
        except (Exception, SystemExit) as error:  # of another library: it is a finding
            report.row("parts", part=name, package=package, result=f"failed: {error}"[:200])
            failed.append(name)
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed, see the table and log.txt")
    if all(row["result"] == "not installed" for row in report.content["tables"]["parts"]):
        raise NotInstalled(", ".join(package for _, package, _ in PARTS))


def trained(keys: list[str], out: Path) -> dict:
    """Steps of a training, their time and memory."""
    keys = [*keys, *QUIET, f"output={out}", f"train.max_steps={STEPS}", "checkpoint.last=false", "optim.lr=1e-5"]
    process = traced.start([*keys, "checkpoint.every_steps=0", "train.dtype=bf16"])
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the run ended with exit code {process.exitcode}")
    steps = [r for r in metrics.read(out / "metrics.jsonl") if r["kind"] == "step"]
    seconds = statistics.median(r["step_time"] for r in steps[WARMUP:])
    losses = {"first_loss": steps[0]["loss"], "last_loss": steps[-1]["loss"]}
    return {"step_ms": 1e3 * seconds, "memory_gb": max(r["memory_gb"] for r in steps), **losses}


def qlora(place: Place) -> dict:
    """Adapters over a base model in 4 bits."""
    model = inputs.chat_model(place.scratch, TOY_MODEL if place.toy else GPU_MODEL)
    rows = inputs.chat_rows(place.scratch, rows=60 if place.toy else 1500, words=12 if place.toy else 150)
    keys = ["mode=sft", f"model.path={model}", f"data.train={rows / 'sft.jsonl'}", "lora.enabled=true"]
    keys += ["lora.quantize=nf4", f"data.seq_len={128 if place.toy else 1024}", "train.batch_size=2"]
    return trained(keys, place.scratch / "qlora")


def flash_attention(place: Place) -> dict:
    """The 100M model with flash-attn, and the difference of its first loss from SDPA's."""
    sizes = TOY_DATA if place.toy else GPU_DATA
    data = inputs.token_file(place.scratch, **sizes)
    keys = ["mode=pretrain", f"data.train={data}", f"model.vocab_size={sizes['words']}"]
    keys += SMALL.toy if place.toy else SMALL.keys
    flash, sdpa = (
        trained([*keys, f"model.attention={name}"], place.scratch / name) for name in ("flash_attention_2", "sdpa")
    )
    difference = abs(flash["first_loss"] - sdpa["first_loss"])
    return flash | {"sdpa_step_ms": sdpa["step_ms"], "first_loss_difference": difference}


def cuml(place: Place) -> dict:
    """k-means of the same random directions by cuML and by torch, as `launch/select_data.py` calls them."""
    from ds_llm.selection import methods
    from ds_llm.selection.features import Features
    from ds_llm.selection.options import ClusterConfig

    rows, width, k = (500, 16, 4) if place.toy else (200_000, 256, 64)
    path = place.scratch / "features.npy"
    np.save(path, np.random.default_rng(0).standard_normal((rows, width)).astype(np.float16))
    found: dict = {"rows": rows}
    for backend in ("cuml", "torch"):
        config = ClusterConfig(method="kmeans", k=k, backend=backend)
        features, facts = Features(path, device="cuda"), {}
        began = time.perf_counter()
        labels = methods.kmeans(features, config, backend, facts)
        found |= {f"{backend}_seconds": time.perf_counter() - began, f"{backend}_clusters": len(np.unique(labels))}
    return found


PARTS: tuple[tuple[str, str, Callable[[Place], dict]], ...] = (
    ("QLoRA", "bitsandbytes", qlora),
    ("flash-attn", "flash_attn", flash_attention),
    ("cuML", "cuml", cuml),
)
