"""Runs Triton kernels in Triton's interpreter where there is no GPU, so that the same tests check them on any machine.

Triton reads TRITON_INTERPRET when it is imported, so it is set before any test module (or torch._dynamo, which
imports Triton) can be.
"""

import os
import sys
from collections import Counter

# equal bits whatever the alignment of a tensor, for tests that compare runs byte by byte; MKL reads it when first used
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

if "PYTEST_XDIST_WORKER" in os.environ:  # a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # which DeepSpeed would find out too, with a warning
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise RuntimeError("a pytest plugin imported triton before tests/conftest.py: run with TRITON_INTERPRET=1")

from chats import chats  # noqa: F401 (fixture)
from jobs import corpus, tiny  # noqa: F401 (fixtures)

# how long an example takes is the machine's affair
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_terminal_summary(terminalreporter):
    """Name each reason for which tests were skipped once, with their number."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)
    if reasons:
        terminalreporter.section("not tested here")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:4d}  {reason}")
