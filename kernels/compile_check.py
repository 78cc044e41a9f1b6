"""Compiles every Triton kernel for sm_80 and sm_90 without a GPU and prints registers, shared memory and spills.

`python -m ds_llm.kernels.compile_check` exits with 1 when a kernel does not compile or spills registers.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context

MODULES = ("rope", "moe_routing", "sparse_update", "token_stats", "cross_entropy_rows")
CAPABILITIES = (80, 90)
DTYPES = ("bf16", "fp16", "fp32")


@dataclass
class CompileSpec:
    """One configuration of a kernel, as its public function launches it."""

    name: str  # shown in the table: the kernel and what sets this configuration apart
    fn: Callable  # a @triton.jit function
    signature: dict[str, str]  # type of each runtime argument: "*bf16", "i32", "i64", "fp32"
    constexprs: dict  # value of each tl.constexpr argument
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None  # per thread, where a launch limits them


@dataclass
class Resources:
    registers: int  # per thread
    shared: int  # bytes per block
    spills: int  # bytes of local memory per thread


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What `cuobjdump`, which comes with Triton, reads from one kernel's binary: REG, STACK, SHARED, ..."""
    from ds_llm.compat.triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"\b([A-Z]+):(\d+)", report)}


def compile_spec(spec: CompileSpec, capability: int) -> Resources:
    """Compiles one configuration for `capability` (80 = A100, 90 = H100/H200). Raises what Triton raises.

    Pointers and integers are taken as multiples of 16, as Triton specialises a launch on tensors of usual sizes: wide
    loads need the most registers.
    """
    import triton

    from ds_llm.compat.triton import ASTSource, GPUTarget

    names = spec.fn.arg_names
    signature = {n: "constexpr" if n in spec.constexprs else spec.signature[n] for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or signature[n][0] == "i"
    }
    kernel = triton.compile(
        ASTSource(fn=spec.fn, signature=signature, constexprs=spec.constexprs, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": spec.num_warps, "num_stages": spec.num_stages, "maxnreg": spec.max_registers},
    )
    usage = _resource_usage(kernel.asm["cubin"])
    # a kernel has no arrays of its own, so that its stack holds spilled registers and nothing else
    return Resources(usage["REG"], kernel.metadata.shared, usage["STACK"] + usage["LOCAL"])


@cache
def _specs(module: str) -> list[CompileSpec]:
    return importlib.import_module(f"ds_llm.kernels.{module}").compile_specs()


def _has_dtype(spec: CompileSpec, dtypes: Sequence[str]) -> bool:
    """Whether the configuration is for one of `dtypes`, by its name; those that name none are for all."""
    named = set(spec.name.split()) & set(DTYPES)
    return not named or bool(named & set(dtypes))


def _compile_job(job: tuple[str, int, int]) -> tuple[str, bool]:
    """The row of the table for one configuration (module, its number there, capability), and whether it is good."""
    module, number, capability = job
    spec = _specs(module)[number]
    row = f"{spec.name:58} sm_{capability:<3} {spec.num_warps:5}"
    try:
        used = compile_spec(spec, capability)
    except Exception as error:  # whatever the compiler raises belongs into the table
        return f"{row} does not compile: {type(error).__name__}: {str(error).strip().splitlines()[0]}", False
    return f"{row} {used.registers:9} {used.shared:8} {used.spills:7}", used.spills == 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ds_llm.kernels.compile_check", description=__doc__.split("\n")[0])
    parser.add_argument("--module", nargs="+", choices=MODULES, default=MODULES, help="kernel files to compile")
    parser.add_argument("--capability", nargs="+", type=int, default=CAPABILITIES, help="80 for sm_80, 90 for sm_90")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="element types (default: all)")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes that compile")
    args = parser.parse_args(argv)
    try:
        from ds_llm.compat.triton import knobs
    except ImportError:
        print("triton is not installed: pip install 'triton>=3.6'", file=sys.stderr)
        return 1
    if knobs.runtime.interpret:
        print("TRITON_INTERPRET is set, so kernels are not compiled: unset it", file=sys.stderr)
        return 1
    start = time.time()
    chosen = [(m, i) for m in args.module for i, spec in enumerate(_specs(m)) if _has_dtype(spec, args.dtype)]
    jobs = [(*spec, capability) for spec in chosen for capability in args.capability]
    print(f"{'kernel':58} {'target':6} {'warps':>5} {'registers':>9} {'shared B':>8} {'spill B':>7}")
    failures = 0
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("fork")) as pool:
        for row, good in pool.map(_compile_job, jobs):
            failures += not good
            print(row, flush=True)
    print(f"{len(jobs)} kernels compiled in {time.time() - start:.0f} s, {failures} failed or spilled")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
