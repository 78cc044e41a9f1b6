"""The report shows what the run recorded, needs nothing but itself, and survives whatever state the run is in."""

import html
import itertools
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from ds_llm import hardware
from ds_llm.config.run import load
from ds_llm.errors import UserError
from ds_llm.report import run as report
from ds_llm.report.plots import HeatMap, Line, Plot, binned, draw
from ds_llm.tracking import metrics_file as metrics
from ds_llm.tracking.tracker import Tracker
from ds_llm.train import run_record

LAYERS, EXPERTS = 2, 4


def a_run(folder, steps: int = 60, *, seed: int | None = None, nan_from: int = 10**9, evals: bool = True) -> None:
    """A run folder written by the tracker, with random figures."""
    random = np.random.default_rng(seed)
    config = load(None, ["optim.lr=0.00123", "tracking.tensorboard=false", f"output={folder}"])
    folder.mkdir(parents=True, exist_ok=True)
    run_record.record(config, folder, hardware.environment(), {"zero_optimization": {"stage": 2}})
    info = {"parameters": 1_234_567, "world_size": 2, "zero": 2, "dtype": "bf16"}
    tracker = Tracker(config, folder, total_steps=steps, run_info=info)
    for step in range(steps + 1):
        bad = step >= nan_from
        if step:
            tracker.step(
                {
                    "step": step,
                    "epoch": step / 30,
                    "loss": math.nan if bad else random.uniform(1, 5),
                    "grad_norm": math.inf if bad else random.lognormal(),
                    "lr": 1e-3 * step / steps,
                    "tokens": 100 * step,
                    "samples": step,
                    "tokens_per_s": random.uniform(900, 1100),
                    "step_time": 0.1,
                    "memory_gb": 2.5,
                    "aux_loss": random.uniform(1, 2),
                    "expert_load": random.dirichlet(np.ones(EXPERTS), LAYERS),
                    **({"skipped": "the loss is nan"} if bad else {}),
                }
            )
        if evals and step % 20 == 0:
            found = math.nan if bad else random.uniform(10, 90)
            sample = [{"prompt": "To be", "text": f" <script>alert({step})</script>"}]
            tracker.evaluation(
                {
                    "step": step,
                    "epoch": step / 30,
                    "perplexity": found,
                    "baseline_perplexity": 90.0,
                    "trend_percent": 100 * (found / 90 - 1),
                    "best_perplexity": found,
                    "tokens": 1234,
                    "samples": sample,
                }
            )
    tracker.event("warning", "a < b & c", step=1)
    tracker.summary({"steps": steps})
    tracker.close()


class Page(HTMLParser):
    """Tables by id, every address that is referred to, and all text."""

    def __init__(self, path):
        super().__init__()
        self.tables, self.addresses, self.text, self.tags = {}, [], "", []
        self._table = self._cell = None
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes.items() if k in ("src", "href", "xlink:href", "action", "data")]
        self.addresses += re.findall(r"url\(([^)]*)\)", " ".join(v or "" for v in attributes.values()))
        if tag == "table":
            self._table = self.tables.setdefault(attributes.get("id"), [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._cell = True
            self._table[-1].append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        self.text += data
        if self._cell:
            self._table[-1][-1] += data


def test_tables_hold_what_was_recorded(tmp_path):
    a_run(tmp_path)
    page = Page(report.write(tmp_path))
    records = metrics.read(tmp_path / "metrics.jsonl")
    evals = [r for r in records if r["kind"] == "eval"]
    rows = page.tables["evaluations"][1:]
    assert [int(row[0]) for row in rows] == [e["step"] for e in evals] == [0, 20, 40, 60]
    for row, record in zip(rows, evals, strict=True):
        assert float(row[2]) == pytest.approx(record["perplexity"], abs=0.005)
        assert row[3] == ("" if record["step"] == 0 else f"{record['trend_percent']:+.1f} %")
    best = min((e for e in evals if e["step"]), key=lambda e: e["perplexity"])
    assert [int(row[0]) for row in rows if row[-1] == "best"] == [best["step"]]
    assert ["optim.lr", "0.00123"] in page.tables["configuration"]
    assert "optim.name" not in [row[0] for row in page.tables["configuration"]]  # at its default
    machine = dict(page.tables["machine"])
    found = hardware.environment()
    assert machine["commit"].split()[0] == found["git"]["commit"] and found["versions"]["torch"] in machine["packages"]
    assert page.tables["events"][-1][1:] == ["1", "warning", "a < b & c"]
    for text in ("finished", "1.23 M parameters", "ZeRO-2", "2 processes", "loss", "not finite"):
        assert (text in page.text) == (text != "not finite")


def test_the_page_needs_nothing_but_itself(tmp_path):
    """No address but anchors within the page and embedded images; text of the model cannot become markup."""
    a_run(tmp_path)
    path = report.write(tmp_path)
    page = Page(path)
    assert page.addresses and all(a.startswith(("#", "data:image/")) for a in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", path.read_text())
    assert not re.search(r"https?://|@import|file:", without_namespaces)
    assert html.escape("<script>alert(60)</script>") in path.read_text()
    ids = re.findall(r'\bid="([^"]*)"', path.read_text())
    assert len(ids) == len(set(ids))
    targets = {a[1:] for a in page.addresses if a.startswith("#")}
    assert targets <= set(ids)


def curve(svg: str, colour: str) -> np.ndarray:
    """Points [n, 2] of the longest path drawn in a colour."""
    paths = [p for p in re.findall(r"<path [^>]*>", svg) if f"stroke: var(--{colour})" in p and "<defs>" not in p]
    longest = max(paths, key=len)
    return np.array([[float(v) for v in m] for m in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", longest)])


def test_a_curve_is_drawn_where_its_values_are():
    """Pixels are an affine function of steps and values, downwards on the screen; bad steps leave a gap."""
    random = np.random.default_rng()
    values = random.uniform(-3, 8, 50)
    steps = np.sort(random.choice(1000, 50, replace=False))
    svg = draw(Plot("A < B", "nats", [Line("loss", steps, values)], marks=[int(steps[7])]))
    ET.fromstring(svg)
    drawn = curve(svg, "line-1")
    assert len(drawn) == 50
    for column, expected, sign in ((0, steps, 1), (1, values, -1)):
        slope, offset = np.polyfit(expected, drawn[:, column], 1)
        np.testing.assert_allclose(drawn[:, column], slope * expected + offset, atol=1e-3)
        assert slope * sign > 0
    mark = curve(svg, "bad")
    assert np.allclose(mark[:, 0], drawn[7, 0], atol=1e-3)
    values[20] = math.nan
    gap = draw(Plot("gap", "nats", [Line("loss", steps, values)]))
    assert (
        len(curve(gap, "line-1")) == 49 and len(re.findall(r"M ", max(re.findall(r"<path [^>]*>", gap), key=len))) == 2
    )


def test_long_series_are_averaged_in_bins():
    """Every finite value is in one bin: the sizes and means give back the sum; range and order hold."""
    random = np.random.default_rng()
    n = int(random.integers(700, 5000))
    values = random.normal(size=n)
    values[random.choice(n, 20, replace=False)] = math.nan
    steps, mean, low, high = binned(np.arange(n), values, 100)
    assert len(steps) == 100 and (np.diff(steps) > 0).all()
    edges = np.linspace(0, n, 101).astype(int)
    sizes = [np.isfinite(values[a:b]).sum() for a, b in itertools.pairwise(edges)]
    assert math.isclose((mean * sizes).sum(), np.nansum(values), abs_tol=1e-8)
    assert low.min() == np.nanmin(values) and high.max() == np.nanmax(values)
    assert (low <= mean).all() and (mean <= high).all()


def test_expert_load_is_relative_to_the_layers_mean(tmp_path):
    a_run(tmp_path)
    steps = [r for r in metrics.read(tmp_path / "metrics.jsonl") if r["kind"] == "step"]
    plots = {type(p): p for p in report.plots(steps, []) if isinstance(p, HeatMap)}
    expected = np.mean([np.array(r["expert_load"]) for r in steps], 0) * EXPERTS  # shares sum to 1 in each layer
    np.testing.assert_allclose(plots[HeatMap].values, expected, rtol=1e-9)
    shown = re.findall(r">(\d\.\d\d)</text>", draw(plots[HeatMap]))
    assert {f"{v:.2f}" for v in expected.ravel()} <= set(shown)


ODD_RUNS = [
    (0, {"evals": False}),
    (0, {}),
    (1, {}),
    (3, {"nan_from": 0}),
    (45, {"nan_from": 30}),
    (5, {"evals": False}),
]


@pytest.mark.parametrize("steps, options", ODD_RUNS)
def test_any_run_has_a_report(tmp_path, steps, options):
    """No step, one step, only losses that are not finite, from some step on, no evaluations."""
    a_run(tmp_path, steps, **options)
    page = Page(report.write(tmp_path))
    rows = page.tables.get("evaluations", [])
    assert len(rows) == (0 if options.get("evals") is False else 2 + steps // 20)
    assert ("not finite" in page.text) == ("nan_from" in options)
    assert page.tags.count("svg") >= (4 if steps else 0)


def test_a_killed_run_has_a_report(tmp_path):
    """The metrics file is cut at random bytes, as a kill can leave it."""
    a_run(tmp_path, 30)
    (tmp_path / "environment.json").write_text("{half")
    for name in ("config.yaml", "deepspeed.json"):
        (tmp_path / name).unlink()
    data = (tmp_path / "metrics.jsonl").read_bytes()
    for cut in np.random.default_rng().integers(300, len(data) - 100, 4):
        (tmp_path / "metrics.jsonl").write_bytes(data[:cut])
        text = Page(report.write(tmp_path)).text
        assert "not finished" in text and "no config.yaml" in text


def test_interruption_and_early_stop_are_named(tmp_path):
    for kind, label in (("interrupt", "interrupted"), ("stop", "stopped early")):
        tracker = Tracker(load(None, ["tracking.tensorboard=false"]), tmp_path, total_steps=9, run_info={})
        tracker.event(kind, "because of this", step=3)
        if kind == "stop":
            tracker.summary({"steps": 3})
        tracker.close()
        text = Page(report.write(tmp_path)).text
        assert label in text and "because of this" in text


def test_command_line(tmp_path):
    a_run(tmp_path / "run", 3)
    command = [sys.executable, "-m", "ds_llm.report"]
    done = subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "run" / "report.html")
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    with pytest.raises(UserError, match="no such folder"):
        report.write(tmp_path / "nowhere")
