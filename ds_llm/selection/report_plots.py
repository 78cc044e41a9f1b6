"""Figures of the page of a selection."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ds_llm.report.plots import LINES, TEXT, svg, tick

BINS, MOST_BOXES = 50, 40
EDGE = 0.002  # share of the values at either end that lies beyond the figure
COLOURS = matplotlib.colormaps["tab20"].colors


def cluster_map(points: np.ndarray, labels: np.ndarray, picked: np.ndarray) -> str:
    """Rows at points [n, 2] in the colours of their clusters [n]; rings around picked rows, bool [n]."""

    def paint(_, axes) -> None:
        for number in np.unique(labels):
            inside = labels == number
            colour = COLOURS[number % len(COLOURS)] if number >= 0 else "#9a9a9a"
            axes.scatter(*points[inside].T, s=7, color=colour, linewidths=0, alpha=0.8)
        axes.scatter(*points[picked].T, s=20, facecolors="none", edgecolors=TEXT, linewidths=0.7)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)

    return svg("Map of the clusters", paint)


def per_cluster(labels: np.ndarray, quality: np.ndarray, name: str) -> str:
    """Quartiles of each of the largest clusters; whiskers to the 5th and 95th percentile."""
    count = min(MOST_BOXES, int(labels.max()) + 1)
    groups = [quality[labels == number] for number in range(count)]

    def paint(_, axes) -> None:
        lines = {part: {"color": TEXT, "linewidth": 0.8} for part in ("whiskerprops", "capprops")}
        axes.boxplot(
            groups,
            positions=range(count),
            whis=(5, 95),
            showfliers=False,
            widths=0.6,
            patch_artist=True,
            boxprops={"facecolor": LINES[0], "edgecolor": LINES[0], "alpha": 0.7},
            medianprops={"color": LINES[1], "linewidth": 1.5},
            **lines,
        )
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}"))
        axes.set_xlabel("cluster, the largest first")
        axes.set_ylabel(name)
        axes.yaxis.set_major_formatter(FuncFormatter(tick))

    return svg(f"{name} by cluster", paint)


def shares(kinds: dict[str, np.ndarray], name: str) -> str:
    """Distributions of several sets of values, each as shares of its own number."""
    everything = next(iter(kinds.values()))
    low, high = np.quantile(everything, (EDGE, 1 - EDGE))
    margin = (high - low) * 0.02 or 0.5

    def paint(_, axes) -> None:
        for (label, values), colour in zip(kinds.items(), LINES, strict=False):
            edges = np.linspace(low - margin, high + margin, BINS + 1)
            counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
            axes.stairs(counts / len(values), edges, color=colour, linewidth=1.6, label=label)
        axes.legend(loc="best", fontsize=9)
        axes.set_xlabel(name)
        axes.set_ylabel("share of the rows")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(tick))

    return svg(f"{name} of the pick", paint)


def curve(found: dict) -> str:
    """The measured value at each number of clusters, with a mark at the chosen one."""

    def paint(_, axes) -> None:
        axes.plot(found["k"], found["value"], color=LINES[0], linewidth=1.5, marker="o", markersize=4)
        label = f"k = {found['chosen']}"
        axes.axvline(found["chosen"], color=LINES[1], linewidth=1.2, linestyle="--", label=label)
        axes.legend(loc="best", fontsize=9)
        axes.set_xlabel("clusters")
        axes.set_ylabel(found["name"])
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(tick))

    return svg("Number of clusters", paint)
