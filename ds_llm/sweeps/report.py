"""Report of a sweep: `report.html` in its folder, with all trials, importances, and the best trial as a recipe."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from ds_llm.progress import duration
from ds_llm.report.page import render, save
from ds_llm.report.plots import BAD, LINES, TEXT, svg, tick
from ds_llm.sweeps.space import Parameter

FILE = "report.html"
FOR_IMPORTANCE = 4  # least finished trials for importances
LABELLED = 12  # values of a list that are named on an axis

PAGE = """{% extends "frame" %}
{% block title %}sweep{% endblock %}
{% block body %}
{% if plots %}<h2>Trials and parameters</h2>
<section class="plots">
{% for plot in plots %}
<figure class="card" style="margin: 0"><h3>{{ plot.title }}</h3>{{ plot.svg | safe }}
<figcaption class="soft">{{ plot.note }}</figcaption></figure>
{% endfor %}
</section>
{% endif %}
{% if best %}
<h2>Best configuration</h2>
<section class="card">
<div>Trial {{ best.number }}: {{ best.value }}. As a whole it is <code>{{ best.file }}</code>.</div>
<pre>{{ best.drawn }}</pre>
<pre>{{ best.command }}</pre>
</section>
{% endif %}
<h2>All trials</h2>
<section class="card scroll"><table id="trials">
<tr><th class="number">trial</th><th class="number">{{ metric }}</th>
{% for name in names %}<th class="number">{{ name }}</th>{% endfor %}
<th class="number">steps</th><th class="number">time</th><th></th></tr>
{% for row in rows %}
<tr><td class="number">
{% if row.page %}<a href="{{ row.page }}">{{ row.number }}</a>{% else %}{{ row.number }}{% endif %}
</td><td class="number">{{ row.value }}</td>{% for value in row.drawn %}<td class="number">{{ value }}</td>{% endfor %}
<td class="number">{{ row.steps }}</td><td class="number">{{ row.time }}</td>
<td class="wide {{ row.tone }}" style="min-width: 18em">{{ row.note }}</td></tr>
{% endfor %}
</table></section>
<h2>Sweep file</h2>
<section class="card"><details><summary>{{ file }}</summary><pre>{{ source }}</pre></details></section>
{% endblock %}
"""


def write(sweep) -> Path:
    """Write the page of a `ds_llm.sweeps.study.Sweep` with its trials so far. Returns its path."""
    file, metric = sweep.file, sweep.file.metric
    trials, best = sweep.study.trials, sweep.best()
    counts = {s.name: sum(t.state == s for t in trials) for s in sweep.states}
    seconds = sum(t.user_attrs.get("seconds", 0.0) for t in trials)
    tiles = [
        {"name": f"Best {metric.name}", "value": f"{best.value:.5g}" if best else "none yet",
         "note": f"trial {best.number}" if best else "", "tone": ""},
        {"name": "Finished", "value": f"{counts['COMPLETE']}", "note": f"of {sweep.count} trials", "tone": ""},
        {"name": "Ended early", "value": f"{counts['PRUNED']}", "note": "", "tone": ""},
        {"name": "Failed", "value": f"{counts['FAIL']}", "note": "", "tone": "bad" if counts["FAIL"] else ""},
        {"name": "Time of all trials", "value": duration(seconds), "note": "", "tone": ""},
    ]  # fmt: skip
    page = render(
        PAGE,
        name=str(file.raw.get("name", sweep.output.name)),
        subtitle=f"{file.method} search, {metric.name} to {'mini' if metric.minimize else 'maxi'}mise",
        tiles=tiles,
        plots=_plots(sweep, trials, best),
        best=_best(sweep, best) if best else None,
        metric=metric.name,
        names=[p.name for p in file.varying],
        rows=[_row(sweep, t, best) for t in sorted(trials, key=lambda t: _rank(sweep, t))],
        file=file.path,
        source=json.dumps(file.raw, indent=2, ensure_ascii=False),
    )
    return save(page, sweep.output / FILE)


def _best(sweep, best) -> dict:
    values = best.user_attrs["values"]
    words = sweep.file.words(values, f"output={sweep.output / 'best'}")
    return {
        "number": best.number,
        "value": f"{sweep.file.metric.name} {best.value:.6g}",
        "file": str(sweep.output / "best.yaml"),
        "drawn": "\n".join(f"{p.name}: {values[p.name]}" for p in sweep.file.varying),
        "command": shlex.join(words),
    }


def _rank(sweep, trial) -> tuple:
    """Finished trials from the best to the worst, then the others by number."""
    if trial.state == sweep.states.COMPLETE:
        return (0, trial.value if sweep.file.metric.minimize else -trial.value, trial.number)
    return (1, 0.0, trial.number)


def _row(sweep, trial, best) -> dict:
    attrs = trial.user_attrs
    notes = {"COMPLETE": "", "PRUNED": "ended early: ", "FAIL": "failed: ", "RUNNING": "running or interrupted"}
    note = notes.get(trial.state.name, "") + attrs.get("reason", "")
    values = attrs.get("values", {})
    page = f"trials/{trial.number:04d}/{FILE}"
    return {
        "number": trial.number,
        "page": page if (sweep.output / page).is_file() else None,
        "value": f"{trial.value:.6g}" if trial.value is not None else "",
        "drawn": [values.get(p.name, "") for p in sweep.file.varying],
        "steps": f"{attrs['steps']:,}" if "steps" in attrs else "",
        "time": duration(attrs["seconds"]) if "seconds" in attrs else "",
        "note": "best" if best and trial.number == best.number else note,
        "tone": {"FAIL": "bad", "PRUNED": "soft"}.get(trial.state.name, "good" if best == trial else ""),
    }


def _plots(sweep, trials: list, best) -> list[dict]:
    if best is None:
        return []
    done = [t for t in trials if t.state == sweep.states.COMPLETE]
    cut = [t for t in trials if t.state == sweep.states.PRUNED and t.value is not None]
    name = sweep.file.metric.name
    found = [("Best value so far", "", lambda figure, axes: _history(axes, done, cut, sweep.file.metric))]
    varying = [p for p in sweep.file.varying if len({t.user_attrs["values"][p.name] for t in done}) > 1]
    if varying and len(done) >= FOR_IMPORTANCE:
        shares = importances(sweep.study, [p.name for p in varying])
        note = "share of each parameter in reaching the best half of the values (PED-ANOVA, arXiv:2304.10255)"
        found.append(("Importance of the parameters", note, lambda figure, axes: _bars(axes, shares)))
    if varying:
        found.append(
            (
                "Parallel coordinates",
                "a line is a finished trial, dark lines are good ones, the thick one is the best",
                lambda figure, axes: parallel(figure, axes, varying, done, sweep.file.metric),
            )
        )
    return [{"title": title if i else f"{name} of the trials", "note": note, "svg": svg(title, paint)}
            for i, (title, note, paint) in enumerate(found)]  # fmt: skip


def importances(study, names: list[str]) -> dict[str, float]:
    """Importance of each parameter, largest first, with sum 1 (PED-ANOVA, Watanabe et al. 2023, by Optuna)."""
    from ds_llm.compat.optuna import PedAnovaImportanceEvaluator, get_param_importances

    evaluator = PedAnovaImportanceEvaluator(target_quantile=0.5)
    return get_param_importances(study, evaluator=evaluator, params=names)


def _history(axes, done: list, cut: list, metric) -> None:
    axes.plot([t.number for t in done], [t.value for t in done], "o", color=LINES[0], markersize=5, label="finished")
    if cut:
        numbers, values = [t.number for t in cut], [t.value for t in cut]
        axes.plot(numbers, values, "x", color=BAD, markersize=5, label="ended early, its last value")
    lowest = np.minimum.accumulate if metric.minimize else np.maximum.accumulate
    axes.step(
        [t.number for t in done], lowest([t.value for t in done]), where="post", color=LINES[1], label="best so far"
    )
    values = [t.value for t in [*done, *cut]]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(tick)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("trial")
    axes.set_ylabel(metric.name)
    axes.legend(loc="best", fontsize=9)


def _bars(axes, shares: dict[str, float]) -> None:
    names = list(shares)[::-1]
    axes.barh(names, [shares[name] for name in names], color=LINES[0], height=0.6)
    axes.set_xlim(0, 1)
    axes.grid(False, axis="y")
    for place, name in enumerate(names):
        axes.text(shares[name] + 0.01, place, f"{shares[name]:.0%}", va="center", fontsize=9)


def parallel(figure, axes, varying: list[Parameter], done: list, metric) -> None:
    """Parallel coordinates: an axis per parameter and one for the metric, a line per finished trial."""
    import matplotlib

    rows = [[t.user_attrs["values"][p.name] for p in varying] for t in done]
    columns = [_axis(p, [row[i] for row in rows]) for i, p in enumerate(varying)]
    results = [t.value for t in done]
    columns.append(_scale(results, min(results) > 0 and max(results) > 10 * min(results)))
    heights = np.array([places for places, _ in columns]).T  # [trials, axes]
    worst_first = sorted(range(len(done)), key=lambda i: results[i], reverse=metric.minimize)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.95, 0.1, len(done)))
    for order, i in enumerate(worst_first):
        last = order == len(done) - 1
        axes.plot(
            heights[i], color=LINES[1] if last else shades[order], linewidth=2.6 if last else 1.1, zorder=2 + order
        )
    axes.set_xticks(range(len(columns)), [p.name for p in varying] + [metric.name], rotation=12)
    axes.set_yticks([])
    axes.set_ylim(-0.08, 1.08)
    axes.set_xlim(-0.35, len(columns) - 0.65)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for place, (_, labels) in enumerate(columns):
        axes.axvline(place, color=TEXT, linewidth=0.8, alpha=0.6)
        for height, label in labels:
            axes.text(place + 0.03, height, label, fontsize=8, va="center", zorder=200)
    figure.set_size_inches(max(6.4, 1.5 * len(columns)), 3.6)


def _axis(parameter: Parameter, texts: list[str]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights 0 to 1 of the values, and the labels of the axis with theirs."""
    if "values" in parameter.fields:
        known = [text for text in parameter.grid() if text in texts]
        place = {text: i / max(len(known) - 1, 1) for i, text in enumerate(known)}
        every = math.ceil(len(known) / LABELLED)
        return [place[text] for text in texts], [(place[text], text) for text in known[::every]]
    return _scale([float(text) for text in texts], parameter.logarithmic)


def _scale(values: list[float], logarithmic: bool) -> tuple[list[float], list[tuple[float, str]]]:
    logarithmic = logarithmic and min(values) > 0
    numbers = np.log(values) if logarithmic else np.array(values, float)
    low, span = numbers.min(), np.ptp(numbers) or 1.0
    ends = [(0.0, min(values)), (1.0, max(values))]
    return list((numbers - low) / span), [(height, tick(value)) for height, value in ends]
