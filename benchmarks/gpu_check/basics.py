"""The card itself, the kernels' tests on it, and the table of kernels."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec

import torch

from benchmarks import kernels
from benchmarks.gpu_check.install import ROOT
from benchmarks.gpu_check.report import NotInstalled, Place, Report

PACKAGES = ("accelerate", "datasets", "flash-attn", "bitsandbytes", "omegaconf", "peft", "pyarrow", "trl")
TEST_PROCESSES = 8
SHOW_SECONDS = 1.0
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
WORTH = ("linear cross-entropy", "linear token", "experts", "permute", "rope", "route")  # the rest comes after these


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def card(report: Report, place: Place) -> None:
    """Driver and further versions, bytes per second of a copy, operations per second of matrix products."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    report.figures(cuda=torch.version.cuda, driver=driver(), further_versions=versions)
    where, seconds = device(), 0.02 if place.toy else 0.5
    if where.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        major, minor = torch.cuda.get_device_capability()
        report.figures(memory_gb=total / 1e9, free_memory_gb=free / 1e9, capability=f"{major}.{minor}")
    report.figures(copy_gb_per_s=kernels.copy_bandwidth(where, seconds) / 1e9)
    for dtype in (torch.bfloat16, torch.float32):
        name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        report.figures(**{f"{name}_product_tflop_per_s": kernels.product_rate(where, dtype, seconds) / 1e12})


def driver() -> str | None:
    """The version of NVIDIA's driver, as nvidia-smi says it."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() or None


def kernel_tests(report: Report, place: Place) -> None:
    """Outcomes of `tests/kernels`. Those that compile for other cards need no GPU and are left out; a dry run takes
    one file, because Triton's interpreter is slow."""
    absent = [name for name in ("pytest", "pytest_timeout", "hypothesis") if find_spec(name) is None]
    if absent:
        raise NotInstalled(f"{', '.join(absent)}: benchmarks/gpu_wheels.sh fetches them")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "--timeout=120", "-p", "no:cacheprovider"]
    command += ["--maxfail=20", "--tb=short"]
    if place.toy:
        command += ["tests/kernels/test_rope.py"]
    else:
        command += ["tests/kernels", "--ignore=tests/kernels/test_compile.py"]
        if find_spec("xdist"):
            command += ["-n", str(TEST_PROCESSES)]
    outcomes, failed, shown = Counter(), [], 0.0
    began = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests:
        for line in tests.stdout:
            print(line, end="", flush=True)
            found = OUTCOME.search(line)
            if found is None or "::" not in line or line.startswith(("FAILED", "ERROR")):  # the summary at the end
                continue
            outcomes[found[1].lower()] += 1
            if found[1] in ("FAILED", "ERROR"):
                failed.append(next(word for word in line.split() if "::" in word))
            if time.monotonic() - shown > SHOW_SECONDS or failed:
                shown = time.monotonic()
                report.figures(outcomes=dict(outcomes), failed_tests=failed)
    report.figures(outcomes=dict(outcomes), failed_tests=failed, tests_s=time.monotonic() - began)
    if tests.returncode or not outcomes["passed"]:
        sys.exit(f"error: pytest ended with exit code {tests.returncode}, {dict(outcomes)}")


def in_order_of_worth(cases: list[kernels.KernelCase], shapes: int | None = None) -> list[kernels.KernelCase]:
    """One shape of every kernel, those of `WORTH` first, then the second shapes, and so on, up to `shapes`."""

    def worth(kernel: str) -> int:
        return next((i for i, start in enumerate(WORTH) if kernel.startswith(start)), len(WORTH))

    by_kernel: dict[str, list[kernels.KernelCase]] = {}
    for case in cases:
        by_kernel.setdefault(case.kernel, []).append(case)
    turns = itertools.zip_longest(*(by_kernel[name] for name in sorted(by_kernel, key=worth)))
    return [case for turn in itertools.islice(turns, shapes) for case in turn if case is not None]


def kernel_table(report: Report, place: Place) -> None:
    """`benchmarks.kernels` case by case: one that fails is named in the table and keeps back no other."""
    where, seconds = device(), 0.001 if place.toy else 0.05
    rates = kernels.Rates(where, seconds)
    report.figures(copy_gb_per_s=rates.bandwidth / 1e9, liger_kernel=find_spec("liger_kernel") is not None)
    cases = in_order_of_worth(list(kernels.load_cases(small=place.toy)), shapes=1 if place.toy else None)
    report.figures(measured=0, failed=0, of=len(cases))
    for number, case in enumerate(cases, 1):
        cells = {"kernel": case.kernel, "shape": case.shape, "us": None}
        try:
            row = kernels.measure(case, where, rates, compiled=not place.toy, seconds=seconds)
        except (Exception, SystemExit) as error:  # of a compiler, a library or the comparison: it is a finding
            reason = next(iter(str(error).strip().splitlines()), "")
            report.row("kernels", **cells, error=f"{type(error).__name__}: {reason}"[:200])
            report.figures(failed=report.content["figures"]["failed"] + 1)
        else:
            cells |= {"us": row.microseconds, "of roofline": row.roofline_microseconds / row.microseconds}
            work = {"tflop_per_s": row.flops / 1e6} if row.flops else {"gb_per_s": row.bytes / 1e3}
            cells |= {name: value / row.microseconds for name, value in work.items()}
            cells |= {f"{name} / ours": us / row.microseconds for name, us in row.others.items()}
            report.row("kernels", **cells)
            report.figures(measured=report.content["figures"]["measured"] + 1)
        print(f"{number}/{len(cases)} {case.kernel} {case.shape}", flush=True)
        torch._dynamo.reset()
        if where.type == "cuda":
            torch.cuda.empty_cache()
    if not report.content["figures"]["measured"]:
        sys.exit("error: no kernel could be measured")
