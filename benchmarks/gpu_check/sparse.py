"""Fine-tuning of kept weights beside setting pruned ones back to zero, by `benchmarks.sparse`."""

from __future__ import annotations

import json
import statistics

from benchmarks import sparse as benchmark
from benchmarks.gpu_check.report import Place, Report

GPU = {"shape": "large", "batch": 4, "length": 1024, "rounds": 5}
TOY = {"shape": "tiny", "batch": 2, "length": 16, "rounds": 2}
TOY_CONTESTANTS = ("re-masked", "compact")  # each is a process


def sparse(report: Report, place: Place) -> None:
    """State, peak memory and step time of every contestant, and their ratios to re-masking."""
    found = place.scratch / "sparse.json"
    options = TOY if place.toy else GPU
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    arguments += ["--only", *(TOY_CONTESTANTS if place.toy else benchmark.CONTESTANTS)]
    benchmark.main([*arguments, "--json", str(found)])
    result = json.loads(found.read_text())
    rows = result["contestants"]
    for name, row in rows.items():
        cells = {f"{key}_gb": row[f"{key}_bytes"] / 1e9 for key in ("state", "mask", "peak")}
        report.row("contestants", contestant=name, **cells, step_ms=1e3 * statistics.median(row["seconds"]))
    pair = rows["compact"], rows["re-masked"]
    report.figures(
        density=result["density"],
        state_of_re_masked=pair[0]["state_bytes"] / pair[1]["state_bytes"],
        peak_of_re_masked=pair[0]["peak_bytes"] / pair[1]["peak_bytes"],
        time_of_re_masked=statistics.median(a / b for a, b in zip(pair[0]["seconds"], pair[1]["seconds"], strict=True)),
        loss_difference=max(abs(a - b) for a, b in zip(pair[0]["losses"], pair[1]["losses"], strict=True)),
    )
