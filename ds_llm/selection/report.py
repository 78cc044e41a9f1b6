"""The page of a selection: a map of the clusters, the quality of their rows, picked rows and others."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_llm.progress import console
from ds_llm.report.page import render, save
from ds_llm.scoring.report import folded, text_of
from ds_llm.selection import report_plots as plots
from ds_llm.selection.clustering import UNUSABLE
from ds_llm.selection.features import Features
from ds_llm.selection.report_template import PAGE

MAP_ROWS = 2_000
SHOWN_CLUSTERS, SHOWN_ROWS = 6, 2  # of which rows are shown, and how many of each kind
WORST_ROWS = 6


@dataclass
class Rows:
    """labels: int32 [rows], negative where a row is in no cluster; quality: float64 [rows]; picked: bool [rows]; drawn:
    positions of a random pick of the same size; features: of the usable rows, None without."""

    labels: np.ndarray
    quality: np.ndarray
    picked: np.ndarray
    drawn: np.ndarray
    features: Features | None


def figures(labels: np.ndarray, quality: np.ndarray, picked: np.ndarray, drawn: np.ndarray) -> dict:
    """Figures of a pick for the page and report.json, beside those of a random pick of the same size."""
    usable = np.flatnonzero(labels != UNUSABLE)
    chosen = np.flatnonzero(picked)
    common = int(picked[drawn].sum())
    return {
        "rows": len(labels),
        "usable": len(usable),
        "picked": len(chosen),
        "clusters": int(labels.max(initial=-1)) + 1,
        "clusters_picked": len(np.unique(labels[chosen])),
        "mean_quality": {
            "all": float(quality[usable].mean()),
            "picked": float(quality[chosen].mean()),
            "random": float(quality[drawn].mean()),
        },
        "random": {
            "common": common,
            "share": common / len(chosen),
            "expected_share": len(chosen) / len(usable),
            "clusters": len(np.unique(labels[drawn][labels[drawn] >= 0])),
        },
    }


def examples(labels: np.ndarray, better: np.ndarray, chosen: np.ndarray) -> list[tuple[str, list[int]]]:
    """(title, rows) to show: of the largest clusters the first picked rows and the best others; the worst of all rows.

    better: float64 [rows], higher is better; chosen: rows in the order of the pick.
    """
    picked = np.zeros(len(labels), bool)
    picked[chosen] = True
    groups = []
    for number in range(min(SHOWN_CLUSTERS, int(labels.max(initial=-1)) + 1)):
        left = np.flatnonzero((labels == number) & ~picked)
        left = left[np.argsort(-better[left], kind="stable")]
        groups.append((f"Cluster {number}: picked", chosen[labels[chosen] == number][:SHOWN_ROWS].tolist()))
        groups.append((f"Cluster {number}: the best of those passed over", left[:SHOWN_ROWS].tolist()))
    left = np.flatnonzero((labels >= 0) & ~picked)
    groups.append(
        ("The worst of all rows passed over", left[np.argsort(better[left], kind="stable")][:WORST_ROWS].tolist())
    )
    return [(title, rows) for title, rows in groups if rows]


def write(out: Path, result: dict, rows: Rows, shown: list[tuple[str, list[int]]], lines: dict[int, bytes]) -> None:
    """Make the page. result: what report.json holds; shown: of `examples`; lines: JSON of the rows in it."""
    name, how = result["settings"]["quality"], result["settings"]
    facts, means, chance = result["clustering"], result["mean_quality"], result["random"]
    drawings = []
    if rows.features is not None:
        drawings.append(_map(rows, facts))
    if result["clusters"] > 1:
        drawings.append((f"{name} of the rows of each cluster", plots.per_cluster(rows.labels, rows.quality, name), ""))
    kinds = {
        "all rows": rows.quality[rows.labels != UNUSABLE],
        "picked": rows.quality[rows.picked],
        "random": rows.quality[rows.drawn],
    }
    drawings.append((f"{name} of what is picked", plots.shares(kinds, name), "share of the rows of each kind"))
    if curve := facts.get("curve"):
        note = f"k = {curve['chosen']} was chosen"
        drawings.append((f"Number of clusters: {curve['name']}", plots.curve(curve), note))
    bad = sum(result["unusable"].values())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in result["unusable"].items())
    tiles = [
        ("picked", f"{result['picked']:,}", f"of {result['usable']:,} usable, {how['pick'].replace('_', ' ')}", ""),
        ("clusters", f"{result['clusters']:,}", f"{result['clusters_picked']:,} of them in the pick", ""),
        (f"mean {name}", f"{means['picked']:.4g}", f"all rows {means['all']:.4g}, random {means['random']:.4g}", ""),
        ("in common with a random pick", f"{chance['share']:.1%}", f"chance gives {chance['expected_share']:.1%}", ""),
        ("rows that cannot be picked", f"{bad:,}", reasons or "none", "bad" if bad else ""),
    ]  # fmt: skip
    page = render(
        PAGE,
        name=f"Selection {out.parent.name}",
        subtitle=f"{100 * how['percentage']:.3g} %, {how['best']} {name} first; clusters by {_method(facts)}",
        tiles=[dict(zip(("name", "value", "note", "tone"), tile, strict=True)) for tile in tiles],
        plots=[{"title": title, "svg": svg, "note": note} for title, svg, note in drawings],
        clusters=_clusters(rows),
        quality=name,
        trials=[
            {k: f"{v:.3g}" if isinstance(v, float) else f"{v:,}" for k, v in t.items()} for t in facts.get("trials", [])
        ],
        groups=[
            {
                "title": title,
                "rows": [
                    {"row": f"{i + 1:,}", "value": f"{rows.quality[i]:.5g}", **folded(_text(lines[i]))} for i in some
                ],
            }
            for title, some in shown
        ],
    )
    save(page, out)


def show(out: Path, result: dict) -> None:
    """Print a summary of the pick."""
    means, chance = result["mean_quality"], result["random"]
    console.print(
        f"{out}: {result['picked']:,} of {result['usable']:,} rows from {result['clusters_picked']:,} of "
        f"{result['clusters']:,} clusters; mean {result['settings']['quality']} {means['picked']:.4g}, of all rows "
        f"{means['all']:.4g}, of a random pick {means['random']:.4g}, with which it shares {chance['share']:.1%}"
    )
    if bad := sum(result["unusable"].values()):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in result["unusable"].items())
        console.print(f"  {bad:,} of {result['rows']:,} rows cannot be picked: {reasons}")
    console.print(f"report: {out.with_name('report.html')}")


def _map(rows: Rows, facts: dict) -> tuple[str, str, str]:
    """The clusters in two dimensions."""
    sample = rows.features.sample(MAP_ROWS, 0)
    points = sample.all().cpu().numpy()
    if importlib.util.find_spec("umap") and len(points) > 10:
        from umap import UMAP

        coordinates, how = UMAP(metric="cosine", random_state=0).fit_transform(points), "UMAP"
    else:
        from sklearn.decomposition import PCA

        pca = PCA(2, random_state=0) if min(points.shape) > 1 else None
        coordinates = pca.fit_transform(points) if pca else np.zeros((len(points), 2))
        how = (
            f"the first two principal components, {pca.explained_variance_ratio_.sum():.0%} of the variance"
            if pca
            else ""
        )
    svg = plots.cluster_map(coordinates, rows.labels[sample.rows], rows.picked[sample.rows])
    return "Map of the clusters", svg, f"{len(points):,} rows drawn at random; {how}; rings: picked"


def _clusters(rows: Rows) -> list[list[str]]:
    """A line for each cluster."""
    found = []
    inside = np.flatnonzero(rows.labels >= 0)
    inside = inside[np.argsort(rows.labels[inside], kind="stable")]
    for part in np.split(inside, np.flatnonzero(np.diff(rows.labels[inside])) + 1):
        taken = part[rows.picked[part]]
        values = rows.quality[part]
        best = f"{rows.quality[taken].mean():.4g}" if len(taken) else "-"
        found.append([
            f"{rows.labels[part[0]]}", f"{len(part):,}", f"{len(taken):,}", f"{len(taken) / len(part):.1%}",
            f"{values.mean():.4g}", f"{values.std():.3g}", best,
        ])  # fmt: skip
    return found


def _method(facts: dict) -> str:
    if facts["method"] == "none":
        return "nothing: all rows are one"
    details = [f"{facts['backend']}"]
    for name in ("k", "passes", "sample", "min_cluster_size", "noise"):
        if name in facts:
            details.append(f"{name.replace('_', ' ')} {facts[name]:,}")
    if facts.get("converged") is False:
        details.append("not converged")
    return f"{facts['method']} ({', '.join(details)})"


def _text(line: bytes) -> str:
    try:
        return text_of(json.loads(line))
    except ValueError:
        return ""
