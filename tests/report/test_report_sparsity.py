"""The table and the picture of kept weights in a report."""

import json
import math

import numpy as np

from ds_llm.report import sparsity as report_sparsity
from ds_llm.report.plots import draw

KINDS = ("self_attn.q_proj.weight", "mlp.experts.down_proj", "mlp.up_proj.weight")


def a_table(random, layers: int) -> list[dict]:
    """Rows as a compact checkpoint has them; the last layer has no experts."""
    rows = []
    for layer in range(layers):
        for kind in KINDS:
            if "experts" in kind and layer == layers - 1:
                continue
            shape = [int(n) for n in random.integers(1, 9, 3 if "experts" in kind else 2)]
            kept = int(random.integers(0, math.prod(shape) + 1))
            nonzero = int(random.integers(0, kept + 1))
            rows.append({"name": f"model.layers.{layer}.{kind}", "shape": shape, "kept": kept, "nonzero": nonzero})
    return rows


def test_each_weight_has_its_share_in_the_table_and_in_the_picture():
    random = np.random.default_rng()
    table = [*a_table(random, 5), {"name": "lm_head.weight", "shape": [4, 4], "kept": 3, "nonzero": 3}]
    picture = report_sparsity.picture(table)
    assert picture.columns == ["q_proj", "experts.down_proj", "up_proj"]
    cells = report_sparsity.rows(table)
    for row, cell in zip(table, cells, strict=True):
        size = math.prod(row["shape"])
        assert cell[0] == row["name"] and cell[1] == " x ".join(map(str, row["shape"])) and cell[2] == f"{size:,}"
        assert cell[3:] == [f"{100 * row[part] / size:.2f}%" for part in ("kept", "nonzero")]
        if row["name"] != "lm_head.weight":
            layer, kind = int(row["name"].split(".")[2]), row["name"].split(".", 3)[3]
            assert picture.values[layer, KINDS.index(kind)] == row["nonzero"] / size
    assert np.isnan(picture.values).sum() == 1 and picture.highest == 1
    assert "Share of weights that are not 0" in draw(picture)
    assert report_sparsity.picture(table[-1:]) is None


def test_the_newest_checkpoint_that_can_be_read_is_shown(tmp_path):
    random = np.random.default_rng()
    assert report_sparsity.read(tmp_path) == []
    tables = {name: a_table(random, 2) for name in (".", "checkpoints/step-00000009", "checkpoints/step-00000010")}
    for name, table in tables.items():
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        (folder / "sparsity.json").write_text(json.dumps(table))
        assert report_sparsity.read(tmp_path) == table
    (tmp_path / "checkpoints/step-00000010/model/sparsity.json").write_text("[{")
    assert report_sparsity.read(tmp_path) == tables["checkpoints/step-00000009"]
