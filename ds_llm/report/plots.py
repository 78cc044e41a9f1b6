"""Plots of a run as SVG in the style of the page: colours are CSS variables, text stays text, no other files."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

POINTS = 600  # of a drawn line; longer series are drawn as the mean and the range of so many bins
# matplotlib knows no CSS: it draws in these colours, which are then replaced by the page's variables
_VARIABLES = {
    "#010101": "var(--text)",
    "#020202": "var(--grid)",
    "#030301": "var(--line-1)",
    "#030302": "var(--line-2)",
    "#030303": "var(--line-3)",
    "#030304": "var(--line-4)",
    "#040404": "var(--bad)",
}
TEXT, _GRID, *LINES, BAD = _VARIABLES
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ds_llm",  # equal plots get equal ids
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "legend.frameon": False,
    "legend.labelcolor": TEXT,
    "path.simplify_threshold": 0.5,
}


@dataclass
class Line:
    """A curve: `steps` [n] and `values` [n], NaN where there is none. `dots` marks every value."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    dots: bool = False


@dataclass
class Plot:
    """Lines over steps with a y-axis label; `level` is a labelled horizontal line, `marks` are steps that went bad.

    `log` uses a logarithmic y-axis where all values are positive and span more than a factor of ten.
    """

    title: str
    unit: str
    lines: list[Line]
    level: tuple[str, float] | None = None
    marks: list[int] = field(default_factory=list)
    log: bool = False
    zero: bool = False  # the y-axis begins at 0


@dataclass
class HeatMap:
    """A table of values [rows, columns] as colours, from 0 to `highest` (none: at least 2, so that 1 is in the middle).

    `columns` names the columns, which are numbered without.
    """

    title: str
    values: np.ndarray
    row_label: str
    column_label: str
    highest: float | None = None
    columns: list[str] | None = None


def draw(plot: Plot | HeatMap) -> str:
    """The plot as an `<svg>` element to put into an HTML page that defines the variables of `_VARIABLES`."""
    if isinstance(plot, HeatMap):
        return svg(plot.title, lambda figure, axes: _heat_map(figure, axes, plot))
    return svg(plot.title, lambda _, axes: _lines(axes, plot))


def svg(title: str, paint: Callable[[Figure, Axes], None]) -> str:
    """What `paint` draws, in the colours `TEXT`, `LINES` and `BAD`, as an `<svg>` element, see `draw`."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.0), layout="constrained")
        paint(figure, figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(out.getvalue(), title)


def binned(steps: np.ndarray, values: np.ndarray, bins: int = POINTS) -> tuple[np.ndarray, ...]:
    """(step, mean, lowest, highest) of at most `bins` equal groups of neighbouring values, without NaN."""
    groups = min(bins, len(steps))
    edges = np.linspace(0, len(steps), groups + 1).astype(int)
    rows = []
    for low, high in itertools.pairwise(edges):
        part = values[low:high]
        part = part[np.isfinite(part)]
        found = (part.mean(), part.min(), part.max()) if len(part) else (math.nan,) * 3
        rows.append((steps[low:high].mean(), *found))
    return tuple(np.array(rows).T) if rows else (np.empty(0),) * 4


def _lines(axes, plot: Plot) -> None:
    positive, shown = True, []
    for line, colour in zip(plot.lines, LINES * len(plot.lines), strict=False):
        steps, mean, low, high = binned(line.steps, line.values)
        finite = mean[np.isfinite(mean)]
        shown += [low[np.isfinite(low)], high[np.isfinite(high)]]
        positive = positive and bool((shown[-2] > 0).all())
        # a value between two gaps has no line to either side: it needs a dot to be seen
        marker = "o" if line.dots or len(finite) <= 2 else None
        if len(line.steps) > POINTS:
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, mean, color=colour, linewidth=1.5, marker=marker, markersize=4, label=line.label)
    values = np.concatenate(shown) if shown else np.empty(0)
    if plot.level is not None:
        axes.axhline(plot.level[1], color=LINES[1], linewidth=1.2, linestyle="--", label=plot.level[0])
        values = np.append(values, plot.level[1])
        positive = positive and plot.level[1] > 0
    if plot.log and positive and len(values) and values.max() > 10 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif plot.zero and len(values):
        axes.set_ylim(0, max(values.max() * 1.08, 1e-12))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    for number, step in enumerate(plot.marks[:POINTS]):
        axes.axvline(step, color=BAD, linewidth=0.8, alpha=0.6, label="skipped" if number == 0 else None)
    axes.yaxis.set_major_formatter(FuncFormatter(tick))
    numbers = np.concatenate([line.steps for line in plot.lines])
    if numbers.min() == numbers.max():
        axes.set_xlim(numbers[0] - 1, numbers[0] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(plot.unit)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(loc="best", fontsize=9)


def _heat_map(figure, axes, plot: HeatMap) -> None:
    rows, columns = plot.values.shape
    highest = plot.highest or max(2.0, float(np.nanmax(plot.values)))
    # edges in the colour of the face close the hairlines that renderers leave between cells
    mesh = axes.pcolormesh(plot.values, cmap="viridis", vmin=0, vmax=highest, edgecolors="face", linewidth=0.4)
    for axis, count, most in ((axes.yaxis, rows, 12), (axes.xaxis, columns, 16)):
        shown = range(0, count, math.ceil(count / most))
        axis.set_ticks([i + 0.5 for i in shown], [str(i) for i in shown])
    if plot.columns is not None:
        axes.xaxis.set_ticks([i + 0.5 for i in range(columns)], plot.columns, rotation=30, ha="right")
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(plot.column_label)
    axes.set_ylabel(plot.row_label)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    if rows * columns <= 96:
        for y, x in np.ndindex(rows, columns):
            value = plot.values[y, x]
            if math.isfinite(value):
                dark = value < 0.6 * highest  # text on viridis: light on its dark end
                axes.text(x + 0.5, y + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8,
                          color="#ffffff" if dark else "#000000")  # fmt: skip


def tick(value: float, _=None) -> str:
    """A number on an axis."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return re.sub(r"e([+-])0*", lambda m: "e" + m[1].replace("+", ""), f"{value:.3g}")
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _for_page(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    # ids are page-wide: those that something refers to get the plot's name, the others go
    refer = re.compile(r'(href="#|url\(#)([^")]+)')
    used = {m[1] for m in refer.findall(svg)}
    name = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = refer.sub(rf"\1{name}-\2", svg)
    # it scales with the page instead of having its size in points
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"',
        lambda m: f'<svg role="img" aria-label="{html.escape(title)}" {m[1]}',
        svg,
        count=1,
    )
