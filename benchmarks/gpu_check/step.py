"""One step in a process of its own: `python -m benchmarks.gpu_check.step NAME --part FILE --scratch FOLDER`."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.gpu_check.report import NOT_INSTALLED, NotInstalled, Place, Report
from benchmarks.gpu_check.steps import STEPS, WHEELS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.step", description=__doc__)
    parser.add_argument("name", choices=[step.name for step in (WHEELS, *STEPS)])
    parser.add_argument("--part", type=Path, required=True, help="where its findings go")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for what steps share")
    parser.add_argument("--wheels", type=Path, help="folder of wheels")
    parser.add_argument("--dry-run", action="store_true", help="sizes for a CPU")
    args = parser.parse_args()
    step = next(step for step in (WHEELS, *STEPS) if step.name == args.name)
    report = Report(args.part)
    from ds_llm import cli

    cli.quiet()
    if step is not WHEELS:  # which may bring what the others import
        from benchmarks.machine import record

        report.content["about"] = record()
        report.save()
    module, function = step.function.split(":")
    try:
        run = getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), function)
        run(report, Place(args.scratch, args.dry_run, args.wheels))
    except NotInstalled as missing:
        report.content |= {"status": NOT_INSTALLED, "error": str(missing)}
        report.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
