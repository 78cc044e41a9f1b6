"""The report's section on sparse models: kept weights of each pruned tensor, as table and picture."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from ds_llm.report.plots import HeatMap

TABLE = "model/sparsity.json"
LAYER = re.compile(r"^(.*?\.|)(\d+)\.(.+?)(\.weight)?$")


def read(output: Path) -> list[dict]:
    """Rows {"name", "shape", "kept", "nonzero"} of the newest checkpoint of a run, or of its model; [] without."""
    for folder in [*sorted(output.glob("checkpoints/step-*"), reverse=True), output]:
        try:
            return json.loads((folder / TABLE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return []


def rows(table: list[dict]) -> list[list[str]]:
    """Cells of the table: name, shape, weights, share kept, share that is not 0."""
    found = []
    for row in table:
        weights = int(np.prod(row["shape"]))
        shares = [f"{row[part] / weights:.2%}" for part in ("kept", "nonzero")]
        found.append([row["name"], " x ".join(map(str, row["shape"])), f"{weights:,}", *shares])
    return found


def picture(table: list[dict]) -> HeatMap | None:
    """Shares of weights that are not 0, by layer and kind of weight; None where no name tells a layer."""
    cells = {}
    for row in table:
        if match := LAYER.match(row["name"]):
            cells[int(match[2]), match[3]] = row["nonzero"] / int(np.prod(row["shape"]))
    if not cells:
        return None
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    values = np.full((1 + max(layer for layer, _ in cells), len(kinds)), np.nan)
    for (layer, kind), share in cells.items():
        values[layer, kinds.index(kind)] = share
    short = [kind.removeprefix("self_attn.").removeprefix("mlp.") for kind in kinds]
    return HeatMap("Share of weights that are not 0", values, "layer", "", highest=1.0, columns=short)
