"""Runs Triton kernels in Triton's interpreter where there is no GPU, so that the same tests check them on any machine.

Triton reads TRITON_INTERPRET when it is imported, so it is set before any test module (or torch._dynamo, which
imports Triton) can be.
"""

import os
import subprocess
import sys

# equal bits whatever the alignment of a tensor, for tests that compare runs byte by byte; MKL reads it when first used
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise RuntimeError("a pytest plugin imported triton before tests/conftest.py: run with TRITON_INTERPRET=1")

from chats import chats  # noqa: F401 (fixture)
from jobs import corpus, tiny  # noqa: F401 (fixtures)

BUILDER = pytest.StashKey[subprocess.Popen]()
WHOLE_SUITE = 500  # tests; fewer may not need what is compiled
BUILD = """
from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder
for builder in (ShareMemCommBuilder, CPUAdamBuilder):
    builder().load(verbose=False)
"""


def pytest_collection_finish(session):
    """Compile what DeepSpeed compiles on first use beside the tests that do not need it yet; those that do wait for
    the build's lock."""
    if len(session.items) < WHOLE_SUITE or session.config.option.collectonly or torch.cuda.is_available():
        return
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "MAX_JOBS": "1"}  # one core is left to the tests
    session.config.stash[BUILDER] = subprocess.Popen([sys.executable, "-c", BUILD], env=environment, **quiet)


def pytest_unconfigure(config):
    """The build is over unless the tests were cut short; a killed one leaves a lock, which the next job removes."""
    builder = config.stash.get(BUILDER, None)
    if builder is not None:
        builder.terminate()
        builder.wait()
