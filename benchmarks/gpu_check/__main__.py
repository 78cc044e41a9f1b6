"""Everything that needs a GPU, in the order of worth: `python -m benchmarks.gpu_check --out FOLDER --minutes 8`.

See docs/gpu_check.md. Exit code 0 when every step that was asked for has ended well, now or in an earlier call.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu_check import runner
from benchmarks.gpu_check.install import SITE, link_checkout
from benchmarks.gpu_check.report import NOT_INSTALLED, OK, Place
from benchmarks.gpu_check.steps import NAMES, STEPS, WHEELS
from benchmarks.machine import commit as commit_here
from ds_llm import cli
from ds_llm.errors import UserError

DRY_FACTOR = 4  # a CPU that others use too may take so many times as long


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="results.json, results.md, log.txt")
    parser.add_argument("--minutes", type=positive, default=8.0, help="for all steps together (default 8)")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="STEP", help=f"some steps: {', '.join(NAMES)}")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install what is missing from these, first")
    parser.add_argument("--commit", metavar="HASH", help="of the code, where it lies outside git")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU: does every step run?")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    if args.wheels and not list(args.wheels.glob("*.whl")):
        raise UserError(f"--wheels: {args.wheels}: no wheel there; benchmarks/gpu_wheels.sh FOLDER fetches them")
    if not args.dry_run:
        import torch

        if not torch.cuda.is_available():
            raise UserError("torch finds no GPU; --dry-run tries every step on a CPU")


def main() -> int:
    args = parse()
    check(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: ended by SIGTERM; the same command goes on"))
    results = runner.Results(args.out, args.dry_run)
    steps = [step for step in STEPS if args.only is None or step.name in args.only]
    if args.wheels:
        steps = [WHEELS, *steps]
    end, code = time.monotonic() + 60 * args.minutes, commit_here() or args.commit
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as scratch:
        place = Place(Path(scratch), args.dry_run, args.wheels and args.wheels.resolve())
        link_checkout(place.scratch / SITE)
        for number, step in enumerate(steps, 1):
            start = f"[{number}/{len(steps)}] {step.name}: "
            if step is not WHEELS and results.ended_well(step.name):  # wheels are installed for one call
                print(f"{start}ended well before", flush=True)
                continue
            left = end - time.monotonic()
            if left < runner.LEAST_SECONDS:
                print(f"{start}no time left", flush=True)
                if step.name not in results.content["steps"]:
                    results.put(step.name, {"status": runner.NO_TIME, "what": step.what})
                continue
            limit = min(left, step.seconds * (DRY_FACTOR if args.dry_run else 1))
            print(f"{start}{step.what}; at most {limit:.0f} s, {left:.0f} s left for all", flush=True)
            status = runner.run(step, results, place, code, limit)
            entry = results.content["steps"][step.name]
            print(f"    {status} after {entry['seconds']:.0f} s", flush=True)
    wanting = [step.name for step in steps if results.content["steps"][step.name]["status"] not in (OK, NOT_INSTALLED)]
    print(f"results: {args.out / 'results.md'}")
    if wanting:
        print(f"without a good end: {', '.join(wanting)}; the same command tries them again", file=sys.stderr)
    return 1 if wanting else 0


if __name__ == "__main__":
    cli.run(main)
