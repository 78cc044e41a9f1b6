"""Figures of the page of a scoring run: distributions, and one quantity against another."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ds_llm.report.plots import LINES, TEXT, svg, tick

BINS, CELLS, GROUPS = 60, (80, 48), 20
FEW = 1500  # points are drawn one by one up to so many, else as the number in each cell
EDGE = 0.002  # share of the values at either end that lies beyond the figure


def histogram(values: np.ndarray, name: str) -> str:
    """Rows by the value of a score, [rows] with NaN; the median is marked."""
    values = values[np.isfinite(values)]
    low, high = _range(values)

    def paint(_, axes) -> None:
        axes.hist(values.clip(low, high), bins=BINS, range=(low, high), color=LINES[0], alpha=0.8)
        median = float(np.median(values))
        axes.axvline(median, color=LINES[1], linewidth=1.4, linestyle="--", label=f"median {median:.4g}")
        axes.legend(loc="best", fontsize=9)
        _label(axes, name, "rows")
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))

    return svg(f"Distribution of {name}", paint)


def against(x: np.ndarray, y: np.ndarray, x_name: str, y_name: str, diagonal: bool = False) -> str:
    """Rows by two quantities [rows]; the line is the median of y in groups of equally many rows, or where x = y."""
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    ranges = [_range(x), _range(y)]
    if diagonal:
        ranges = [(min(r[0] for r in ranges), max(r[1] for r in ranges))] * 2

    def paint(figure, axes) -> None:
        if len(x) <= FEW:
            # a picture: as shapes, every point would be an element of the page
            axes.scatter(x, y, s=9, color=LINES[0], alpha=0.5, linewidths=0)
        else:
            counts, *edges = np.histogram2d(x, y, bins=CELLS, range=ranges)
            counts = np.ma.masked_equal(counts.T, 0)
            mesh = axes.pcolormesh(*edges, counts, cmap="viridis", norm=LogNorm(), rasterized=True)
            bar = figure.colorbar(mesh, ax=axes, pad=0.02)
            bar.set_label("rows")
            bar.outline.set_visible(False)
        if diagonal:
            axes.plot(*[ranges[0]] * 2, color=TEXT, linewidth=1, linestyle="--", label="equal")
        elif len(x) >= 2 * GROUPS:
            order = np.array_split(np.argsort(x, kind="stable"), GROUPS)
            groups: dict[float, list[np.ndarray]] = {}  # by their middle: rows of equal x are one group
            for part in order:
                groups.setdefault(float(np.median(x[part])), []).append(part)
            middle = [(place, np.median(y[np.concatenate(parts)])) for place, parts in groups.items()]
            if len(middle) > 1:
                axes.plot(*np.array(middle).T, color=LINES[1], linewidth=1.8, label="median")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="best", fontsize=9)
        axes.set_xlim(*ranges[0])
        axes.set_ylim(*ranges[1])
        _label(axes, x_name, y_name)

    return svg(f"{x_name} and {y_name}", paint)


def comparable(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether two scores share a scale, so that where they are equal means something: their ranges overlap by half."""
    (a, b), (c, d) = _range(x[np.isfinite(x)]), _range(y[np.isfinite(y)])
    return min(b, d) - max(a, c) > 0.5 * min(b - a, d - c) and max(b - a, d - c) < 4 * min(b - a, d - c)


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (EDGE, 1 - EDGE))
    margin = (high - low) * 0.02 or 0.5
    return float(low - margin), float(high + margin)


def _label(axes, x_name: str, y_name: str) -> None:
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter(FuncFormatter(tick))
