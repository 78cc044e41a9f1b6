"""Every kernel compiles for sm_80 and sm_90 without a GPU, and spills no registers."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ds_llm.kernels import compile_check

ROOT = Path(__file__).parents[2]
# this process interprets kernels: compiling takes one that does not
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.parametrize("module", ["token_stats"])
def test_compiles_without_spills(module):
    """One module in bf16; `python -m ds_llm.kernels.compile_check`, which `make test` runs too, compiles all."""
    done = run("-m", "ds_llm.kernels.compile_check", "--module", module, "--dtype", "bf16")
    assert done.returncode == 0, done.stdout + done.stderr
    specs = importlib.import_module(f"ds_llm.kernels.{module}").compile_specs()
    specs = [spec for spec in specs if not re.search(r"\bfp(16|32)\b", spec.name)]
    assert specs
    rows = re.findall(r"^(.+?) +(sm_\d+) +(\d+) +(\d+) +(\d+) +0$", done.stdout, re.MULTILINE)
    assert len(rows) == 2 * len(specs)
    assert {target for _, target, *_ in rows} == {"sm_80", "sm_90"}
    assert all(0 < int(registers) <= 255 for *_, registers, _ in rows)


def test_every_kernel_is_compiled():
    compiled = {
        spec.fn.__name__
        for module in compile_check.MODULES
        for spec in importlib.import_module(f"ds_llm.kernels.{module}").compile_specs()
    }
    launched = {
        name
        for file in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"\b(\w+)\[[^\]\n]*\w", file.read_text())
    }
    defined = {
        name
        for file in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^@jit\ndef (\w+)\(", file.read_text(), re.MULTILINE)
    }
    assert launched & defined <= compiled and compiled <= defined


def test_spills_and_errors_fail_the_check():
    done = run(
        "-c",
        """
import sys
from dataclasses import replace
from ds_llm.kernels import compile_check, token_stats

spec = token_stats.compile_specs()[0]
bad = [spec, replace(spec, max_registers=32), replace(spec, signature=spec.signature | {"logits": "i32"})]
compile_check._specs = lambda module: bad
sys.exit(compile_check.main(["--module", "rope", "--capability", "90"]))
""",
    )
    assert done.returncode == 1, done.stderr
    good, spilled, broken = done.stdout.splitlines()[1:4]
    assert good.endswith(" 0") and int(spilled.split()[-1]) > 0 and "does not compile" in broken
    assert "3 kernels compiled" in done.stdout and "2 failed or spilled" in done.stdout


def test_the_interpreter_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "ds_llm.kernels.compile_check"],
        cwd=ROOT,
        env=ENVIRONMENT | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1 and done.stderr.strip() == "TRITON_INTERPRET is set, so kernels are not compiled: unset it"
    )
