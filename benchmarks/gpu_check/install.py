"""Packages for the steps of a call: this checkout, and wheels of what the machine lacks."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu_check.report import Place, Report

ROOT = Path(__file__).resolve().parents[2]
SITE = "site"  # folder within the scratch folder, on the path of every step


def link_checkout(site: Path) -> None:
    """Make `ds_llm` of this checkout importable from `site`, whether or not it is installed: `kernels/` belongs in it
    as `ds_llm.kernels`, where an installation puts it."""
    package = site / "ds_llm"
    package.mkdir(parents=True)
    for entry in (ROOT / "ds_llm").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")


def distribution(wheel: Path) -> tuple[str, str]:
    """Name and version of a wheel, from its file name."""
    name, number = wheel.name.split("-")[:2]
    return re.sub(r"[-_.]+", "-", name).lower(), number


def wheels(report: Report, place: Place) -> None:
    """Install each wheel whose package is missing, without a network and without what it depends on.

    What the machine has stays as it is, so torch, triton and transformers are never replaced. A wheel that cannot be
    installed is named, does not keep back the others, and fails the step.
    """
    report.figures(installed=0, there_before=0)
    missing, failed = [], []
    for wheel in sorted(place.wheels.glob("*.whl")):
        name, number = distribution(wheel)
        try:
            report.row("wheels", package=name, version=version(name), installed="was there")
        except PackageNotFoundError:
            missing.append((wheel, name, number))
    report.figures(there_before=len(report.content["tables"].get("wheels", [])))
    target = place.scratch / SITE
    at_once = bool(missing) and install([wheel for wheel, *_ in missing], target) is None
    for wheel, name, number in missing:
        error = None if at_once else install([wheel], target)
        if error:
            failed.append(wheel.name)
        report.row("wheels", package=name, version=number, installed=error or "yes")
        report.figures(installed=report.content["figures"]["installed"] + (error is None))
    if failed:
        sys.exit(f"error: --wheels: {', '.join(failed)} cannot be installed; fetch them again")


def install(files: list[Path], target: Path) -> str | None:
    """None, or the last line that pip says about what it cannot install."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index"]
    command += ["--no-deps", "--no-compile", "--upgrade", "--target", str(target), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout + done.stderr, end="", flush=True)
    if not done.returncode:
        return None
    return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit code {done.returncode}")
