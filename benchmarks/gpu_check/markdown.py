"""`results.md`: the results as tables, made of nothing but `results.json`."""

from __future__ import annotations

from benchmarks.gpu_check.steps import STEPS, WHEELS


def show(value: object) -> str:
    """A cell: numbers in four significant digits, whole ones in full, nothing as "-"."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value)) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {show(inner)}" for name, inner in value.items()) or "-"
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(rows: list[dict]) -> list[str]:
    """Rows of cells by name, as lines; columns in the order in which they first occur."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join(["---"] * len(columns)) + " |"]
    return lines + ["| " + " | ".join(show(row.get(name)) for name in columns) + " |" for row in rows]


def device(entry: dict) -> str | None:
    """The card on which a step ran, or the processor."""
    machine = entry.get("about", {}).get("machine")
    if machine is None:
        return None
    return ", ".join(gpu["name"] for gpu in machine["gpus"]) or machine["cpu"]


def page(results: dict) -> str:
    """The whole page."""
    title = "Dry run of the GPU check: toy sizes on a CPU, no measurement" if results["dry_run"] else "GPU check"
    steps = results["steps"]
    order = [step.name for step in (WHEELS, *STEPS) if step.name in steps]
    overview = [
        {
            "step": name,
            "result": steps[name]["status"],
            "seconds": steps[name].get("seconds"),
            "device": device(steps[name]),
            "date": steps[name].get("date"),
            "commit": steps[name].get("commit"),
        }
        for name in order
    ]
    lines = [f"# {title}", "", *table(overview)] if overview else [f"# {title}"]
    for name in order:
        entry = steps[name]
        lines += ["", f"## {name}", "", f"{entry['what']}: {entry['status']}"]
        if versions := entry.get("about", {}).get("versions"):
            lines += ["", "Versions: " + show(versions)]
        if figures := entry.get("figures"):
            lines += ["", *table([{"figure": key, "value": value} for key, value in figures.items()])]
        for title, rows in entry.get("tables", {}).items():
            lines += ["", f"### {name}: {title}", "", *table(rows)]
        if error := entry.get("error"):
            lines += ["", "```", *error.splitlines(), "```"]
    return "\n".join(lines) + "\n"
