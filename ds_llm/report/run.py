"""Report of a run: `report.html` in its folder, one self-contained file from the run's records.

python -m ds_llm.report runs/pretrain
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from ds_llm.config.modes import MODES, Curves
from ds_llm.config.options import flatten, to_dict
from ds_llm.config.run import Config
from ds_llm.config.text_metrics import LABELS
from ds_llm.errors import UserError
from ds_llm.progress import duration
from ds_llm.report import sparsity as report_sparsity
from ds_llm.report.page import RUN, render, save
from ds_llm.report.plots import HeatMap, Line, Plot, draw
from ds_llm.tracking import metrics_file as metrics

FILE = "report.html"
SHOWN_EVENTS = 200
LOAD_STEPS = 100  # the heat map of the experts is the mean over so many of the latest steps


def write(output: Path) -> Path:
    """Make `report.html` from the metrics and settings in the folder of a run; returns its path.

    Only `metrics.jsonl` is required: a run that has just begun, was killed or never evaluated has a report too. Raises
    `UserError` where there are no metrics, they cannot be read or the report cannot be written.
    """
    output = Path(output)
    if not output.is_dir():
        raise UserError(f"{output}: no such folder; name the output folder of a run")
    records = metrics.read(output / metrics.FILE)
    if not records:
        raise UserError(f"{output / metrics.FILE}: no metrics here; name the output folder of a run")
    return save(build(records, output), output / FILE)


def build(records: list[dict], output: Path) -> str:
    """The page for these records and the settings files in `output`."""
    kinds = {kind: [r for r in records if r["kind"] == kind] for kind in ("step", "eval", "event", "summary")}
    steps, evals, events = kinds["step"], kinds["eval"], kinds["event"]
    start = next((e for e in reversed(events) if e.get("event") == "start"), {})
    summary = kinds["summary"][-1] if kinds["summary"] else None
    shown = [e for e in events if e.get("event") != "start"]
    kept = shown if len(shown) <= SHOWN_EVENTS else shown[: SHOWN_EVENTS // 4] + shown[-(SHOWN_EVENTS * 3) // 4 :]
    environment = _json(output / "environment.json") or {}
    figures = plots(steps, evals, start)
    pruned = report_sparsity.read(output)
    if picture := report_sparsity.picture(pruned):
        figures.append(picture)
    return render(
        RUN,
        name=output.resolve().name,
        subtitle=_subtitle(records, start),
        status=_status(records, events, summary, start),
        tiles=_tiles(steps, evals, start),
        plots=[{"title": plot.title, "svg": draw(plot)} for plot in figures],
        evaluations=_evaluations(evals),
        sparsity=report_sparsity.rows(pruned),
        samples=[{"step": e["step"], "rows": e["samples"]} for e in reversed(evals) if e.get("samples")],
        events=[_event(e) for e in kept],
        events_left_out=len(shown) - len(kept),
        changed=_changed(output / "config.yaml"),
        files=[
            (name, text) for name in ("config.yaml", "deepspeed.json") if (text := _text(output / name)) is not None
        ],
        machine=_machine(environment, start),
    )


def plots(steps: list[dict], evals: list[dict], start: dict | None = None) -> list[Plot | HeatMap]:
    """The figures for which these step and evaluation records have values, in the order of the page.

    start: the record of the run's start, whose `loss_unit` labels the loss and whose `mode` has plots of its own.
    """
    skipped = [r["step"] for r in steps if r.get("skipped")]
    unit = (start or {}).get("loss_unit", "nats per token")
    found: list[Plot | HeatMap | None] = [_curve(steps, "loss", "Training loss", unit, marks=skipped)]
    if evals:
        goal = _goal(evals)
        baseline = next((e[f"baseline_{goal}"] for e in evals if e.get(f"baseline_{goal}") is not None), None)
        level = ("baseline", baseline) if baseline is not None else None
        title = f"{goal.capitalize()} on the evaluation set"
        unit = unit if goal == "loss" else goal
        found.append(_curve(evals, goal, title, unit, dots=True, level=level, log=True))
        found.append(_curves(evals, LABELS, "Generated answers against the references", "0 to 100", dots=True))
        files = {name: name.removeprefix("loss/") for e in evals for name in e if name.startswith("loss/")}
        found.append(_curves(evals, files, "Held-out loss by file", "nats per token", dots=True))
    for curves in _own_curves((start or {}).get("mode")):
        records = evals if curves.evaluations else steps
        found.append(_curves(records, curves.lines, curves.title, curves.unit, dots=curves.evaluations))
    found += [
        _curve(steps, "lr", "Learning rate", "learning rate", zero=True),
        _curve(steps, "grad_norm", "Gradient norm", "global L2 norm", log=True, marks=skipped),
        _curve(steps, "tokens_per_s", "Throughput", "tokens/s, all ranks", zero=True),
        _curve(steps, "mfu", "Model FLOPs utilisation", "share of the peak", zero=True),
        _curve(steps, "memory_gb", "Memory of rank 0", "GB", zero=True),
        _curve(steps, "aux_loss", "Load-balancing loss", "mean over layers"),
        _curve(steps, "loss_scale", "Loss scale", "factor", log=True),
    ]
    loads = [(r["step"], np.array(r["expert_load"], float)) for r in steps if r.get("expert_load")]
    loads = [(step, load) for step, load in loads if load.shape == loads[-1][1].shape and load.ndim == 2]
    if loads:
        # times the mean of the layer: 1 everywhere is balance
        scaled = np.stack([load / np.maximum(load.mean(1, keepdims=True), 1e-20) for _, load in loads])
        recent = scaled[-LOAD_STEPS:].mean(0)
        over = f"last {min(len(loads), LOAD_STEPS)} steps" if len(loads) > 1 else "the only step"
        found.append(HeatMap(f"Expert load, {over} (1 = balanced)", recent, "layer", "expert"))
        numbers = np.array([step for step, _ in loads])
        busiest = scaled.max(2)
        layers = range(busiest.shape[1]) if busiest.shape[1] <= 4 else (0, busiest.shape[1] // 2, busiest.shape[1] - 1)
        lines = [Line(f"layer {i}", numbers, busiest[:, i]) for i in layers]
        found.append(Plot("Load of the busiest expert", "times the mean", lines))
    return [plot for plot in found if plot is not None]


def _own_curves(mode: str | None) -> list[Curves]:
    """The plots of a mode; of all modes, each title once, where the record does not say the mode."""
    asked = [MODES[mode]] if mode in MODES else MODES.values()
    found: dict[str, Curves] = {}
    for curves in (curves for each in asked for curves in each.curves):
        found.setdefault(curves.title, curves)
    return list(found.values())


def _goal(evals: list[dict]) -> str:
    """Name of the figure by which the evaluations are compared."""
    return evals[-1].get("goal", "perplexity") if evals else "perplexity"


def _curve(records: list[dict], name: str, title: str, unit: str, dots: bool = False, **style) -> Plot | None:
    """The plot of one field, or None where no record has a number in it."""
    return _curves(records, {name: name.replace("_", " ")}, title, unit, dots, **style)


def _curves(
    records: list[dict], names: Mapping[str, str], title: str, unit: str, dots: bool = False, **style
) -> Plot | None:
    """The plot of the fields (name: label) in which any record has a number, or None without one."""
    lines = [Line(label, *_series(records, name), dots) for name, label in names.items()]
    lines = [line for line in lines if np.isfinite(line.values).any()]
    return Plot(title, unit, lines, **style) if lines else None


def _series(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a field, NaN where a record has no number in it."""
    values = [r.get(name) for r in records]
    numbers = [v if isinstance(v, (int, float)) and not isinstance(v, bool) else math.nan for v in values]
    return np.array([r["step"] for r in records]), np.array(numbers, float)


def _subtitle(records: list[dict], start: dict) -> str:
    parts = [time.strftime("%Y-%m-%d %H:%M", time.localtime(records[0]["time"]))]
    if start.get("parameters"):
        parts.append(f"{_short(start['parameters'])} parameters")
    if start.get("dtype"):
        parts.append(str(start["dtype"]))
    if start.get("zero") is not None:
        parts.append(f"ZeRO-{start['zero']}")
    if start.get("world_size"):
        parts.append(f"{start['world_size']} {'process' if start['world_size'] == 1 else 'processes'}")
    return " · ".join(parts)


def _status(records: list[dict], events: list[dict], summary: dict | None, start: dict) -> dict:
    last = next((e for e in reversed(events) if e.get("event") in ("start", "interrupt", "stop")), {})
    if summary is not None:
        early = last.get("event") == "stop"
        return {
            "label": "stopped early" if early else "finished",
            "tone": "good",
            "note": last.get("message") if early else "",
        }
    if last.get("event") in ("interrupt", "stop"):
        return {"label": "interrupted" if last["event"] == "interrupt" else "stopped", "tone": "bad",
                "note": last.get("message", "")}  # fmt: skip
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(records[-1]["time"]))
    return {
        "label": "not finished",
        "tone": "soft",
        "note": f"The last record is of {when}: when this page was made the run was going on, or had been ended.",
    }


def _tiles(steps: list[dict], evals: list[dict], start: dict) -> list[dict]:
    tiles = []

    def tile(name: str, value: str, note: str = "", tone: str = "") -> None:
        tiles.append({"name": name, "value": value, "note": note, "tone": tone})

    goal = _goal(evals)
    trained = [e for e in evals if e["step"] > 0 and e.get(goal) is not None]
    if trained:
        best = min(trained, key=lambda e: e[goal])
        baseline = best.get(f"baseline_{goal}")
        note, tone = f"at step {best['step']:,}", ""
        if baseline:
            change = 100 * (best[goal] / baseline - 1)
            note, tone = f"{change:+.1f} % from {_number(baseline)}", "good" if change < 0 else "bad"
        tile(f"Best {goal}", _number(best[goal]), note, tone)
    elif evals:
        tile(goal.capitalize(), _number(evals[-1].get(goal)), f"at step {evals[-1]['step']:,}")
    if evals and evals[-1].get("accuracy") is not None:
        note = f"{evals[0]['accuracy']:.1%} at first" if evals[0].get("accuracy") is not None else ""
        tile("Held-out accuracy", f"{evals[-1]['accuracy']:.1%}", note)
    if sparse := start.get("sparse"):
        tile(
            "Kept weights", f"{sparse['density']:.1%}", f"of {_short(sparse['prunable'])} in {sparse['layers']} tensors"
        )
        saved = f"{sparse['dense_state_bytes'] / 1e9:,.2f} GB when dense"
        tile("Weights, gradients, optimizer", f"{sparse['state_bytes'] / 1e9:,.2f} GB", saved)
    if not steps:
        return tiles
    last = steps[-1]
    first_loss = next((r["loss"] for r in steps if r.get("loss") is not None), None)
    note = f"{_number(first_loss)} at first" if first_loss is not None else ""
    tile("Training loss", _number(last.get("loss")), note)
    total = start.get("total_steps")
    tile("Steps", f"{last['step']:,}", f"of {total:,}" if total else "")
    if last.get("tokens") is not None:
        tile("Tokens", _short(last["tokens"]), f"{last['epoch']:.2f} epochs" if last.get("epoch") is not None else "")
    rates = _finite(steps, "tokens_per_s")
    if len(rates):
        tile("Throughput", f"{np.median(rates):,.0f}", "tokens/s, median")
    mfu = _finite(steps, "mfu")
    if len(mfu):
        tile("MFU", f"{np.median(mfu):.1%}", "of the peak, median")
    seconds = _finite(steps, "step_time")
    if len(seconds):
        tile("Time in steps", duration(seconds.sum()), f"{np.median(seconds):.3g} s a step, median")
    memory = _finite(steps, "memory_gb")
    if len(memory):
        tile("Peak memory", f"{memory.max():.2f} GB", "of rank 0")
    skipped = sum(bool(r.get("skipped")) for r in steps)
    tile("Skipped steps", f"{skipped:,}", "", "bad" if skipped else "")
    return tiles


def _finite(records: list[dict], name: str) -> np.ndarray:
    values = _series(records, name)[1]
    return values[np.isfinite(values)]


def _evaluations(evals: list[dict]) -> dict:
    """Column heads, and rows of cells with a note; a column without any value is left out."""
    goal = _goal(evals)
    finite = [e[goal] for e in evals if e["step"] > 0 and e.get(goal) is not None]
    columns = {
        "step": [f"{e['step']:,}" for e in evals],
        "epoch": [f"{e['epoch']:.2f}" if e.get("epoch") is not None else "" for e in evals],
        goal: [_number(e.get(goal)) for e in evals],
        "against the baseline": [
            f"{e['trend_percent']:+.1f} %" if e.get("trend_percent") is not None and e["step"] else "" for e in evals
        ],
        "accuracy": [f"{e['accuracy']:.1%}" if e.get("accuracy") is not None else "" for e in evals],
        **{
            label: [f"{e[name]:.2f}" if e.get(name) is not None else "" for e in evals]
            for name, label in LABELS.items()
        },
        "tokens": [f"{e['tokens']:,}" if e.get("tokens") is not None else "" for e in evals],
        "seconds": [f"{e['seconds']:.1f}" if e.get("seconds") is not None else "" for e in evals],
    }
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    best = [e["step"] > 0 and bool(finite) and e.get(goal) == min(finite) for e in evals]
    notes = ["best" if b else "before training" if e["step"] == 0 else "" for b, e in zip(best, evals, strict=True)]
    rows = zip(*columns.values(), strict=True)
    return {
        "heads": list(columns),
        "rows": [{"cells": cells, "note": note} for cells, note in zip(rows, notes, strict=True)],
    }


def _event(e: dict) -> dict:
    extra = {k: v for k, v in e.items() if k not in ("kind", "event", "message", "step", "time")}
    return {
        "time": time.strftime("%m-%d %H:%M:%S", time.localtime(e["time"])),
        "step": f"{e['step']:,}" if isinstance(e.get("step"), int) else "",
        "kind": e.get("event", ""),
        "message": e.get("message") or ", ".join(f"{k} {v}" for k, v in extra.items()),
        "tone": "bad" if e.get("event") in ("skip", "warning", "interrupt") else "",
    }


def _changed(path: Path) -> list[tuple[str, str]]:
    """Keys of the saved configuration that are not at their default, dotted, with their values."""
    text = _text(path)
    try:
        saved = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        return []
    if not isinstance(saved, dict):
        return []
    defaults = flatten(Config, to_dict(Config()))
    missing = object()
    return [
        (key, json.dumps(value, ensure_ascii=False))
        for key, value in flatten(Config, saved).items()
        if defaults.get(key, missing) != value
    ]


def _machine(environment: dict, start: dict) -> list[tuple[str, str]]:
    rows = []
    if environment.get("command"):
        rows.append(("command", " ".join(environment["command"])))
    git = environment.get("git")
    if git:
        rows.append(("commit", git["commit"] + (" with local changes" if git.get("dirty") else "")))
    if environment.get("versions"):
        rows.append(("packages", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())))
    rows += [(name, str(environment[name])) for name in ("python", "system", "cuda") if environment.get(name)]
    cpu = environment.get("cpu")
    if cpu:
        rows.append(("CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['memory_gb']} GB"))
    gpus = environment.get("gpus") or []
    rows += [("GPU", f"{gpu['name']}, {gpu['memory_gb']} GB") for gpu in gpus]
    known = ("samples", "seq_len", "global_batch")
    rows += [(name.replace("_", " "), f"{start[name]:,}") for name in known if isinstance(start.get(name), int)]
    return rows


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _json(path: Path) -> dict | None:
    try:
        return json.loads(_text(path) or "null")
    except ValueError:
        return None


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _short(count: float) -> str:
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{suffix}"
    return f"{count:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ds_llm.report", description="Write report.html of a run.")
    parser.add_argument("run", help="output folder of the run")
    print(write(Path(parser.parse_args().run)))
