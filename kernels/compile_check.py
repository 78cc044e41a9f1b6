"""Compiles every Triton kernel for sm_80 and sm_90 without a GPU and prints registers, shared memory and spills.

`python -m ds_llm.kernels.compile_check` exits with 1 when a kernel does not compile or spills registers.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MODULES = ("rope", "moe_routing", "sparse_update", "token_stats", "cross_entropy_rows")
CAPABILITIES = (80, 90)


@dataclass
class CompileSpec:
    """One configuration of a kernel, as its public function launches it."""

    name: str  # shown in the table: the kernel and what sets this configuration apart
    fn: Callable  # a @triton.jit function
    signature: dict[str, str]  # type of each runtime argument: "*bf16", "i32", "i64", "fp32"
    constexprs: dict  # value of each tl.constexpr argument
    num_warps: int = 4
    num_stages: int = 3


@dataclass
class Resources:
    registers: int  # per thread
    shared: int  # bytes per block
    spills: int  # bytes stored to and loaded from local memory per thread


def _ptxas() -> list[str]:
    """The assemblers that come with Triton; which of them reads a PTX file depends on Triton's version."""
    from triton import knobs

    tools = (getattr(knobs.nvidia, name, None) for name in ("ptxas", "ptxas_blackwell"))
    return [tool.path for tool in tools if tool is not None]


def _assemble(ptx: str) -> str:
    """What `ptxas -v` reports for one kernel."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        for tool in _ptxas():
            done = subprocess.run(
                [tool, "-v", f"--gpu-name={target}", str(source), "-o", str(Path(folder) / "kernel.cubin")],
                capture_output=True,
                text=True,
            )
            if done.returncode == 0:
                return done.stderr
    raise RuntimeError(done.stderr.strip().splitlines()[0])


def compile_spec(spec: CompileSpec, capability: int) -> Resources:
    """Compiles one configuration for `capability` (80 = A100, 90 = H100/H200). Raises what Triton or ptxas raises.

    Pointers and integers are taken as multiples of 16, as Triton specialises a launch on tensors of usual sizes: wide
    loads need the most registers.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec.fn.arg_names
    signature = {n: "constexpr" if n in spec.constexprs else spec.signature[n] for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or signature[n][0] == "i"
    }
    kernel = triton.compile(
        ASTSource(fn=spec.fn, signature=signature, constexprs=spec.constexprs, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": spec.num_warps, "num_stages": spec.num_stages},
    )
    report = _assemble(kernel.asm["ptx"])
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    return Resources(int(re.search(r"Used (\d+) registers", report).group(1)), kernel.metadata.shared, spilled)


def all_specs(modules: tuple[str, ...] = MODULES) -> Iterator[CompileSpec]:
    for module in modules:
        yield from importlib.import_module(f"ds_llm.kernels.{module}").compile_specs()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ds_llm.kernels.compile_check", description=__doc__.split("\n")[0])
    parser.add_argument("--module", nargs="+", choices=MODULES, default=MODULES, help="kernel files to compile")
    parser.add_argument("--capability", nargs="+", type=int, default=CAPABILITIES, help="80 for sm_80, 90 for sm_90")
    args = parser.parse_args(argv)
    try:
        from triton import knobs
    except ImportError:
        print("triton is not installed: pip install 'triton>=3.6'", file=sys.stderr)
        return 1
    if knobs.runtime.interpret:
        print("TRITON_INTERPRET is set, so kernels are not compiled: unset it", file=sys.stderr)
        return 1
    failures, count, start = 0, 0, time.time()
    print(f"{'kernel':58} {'target':6} {'warps':>5} {'registers':>9} {'shared B':>8} {'spill B':>7}")
    for spec in all_specs(tuple(args.module)):
        for capability in args.capability:
            count += 1
            row = f"{spec.name:58} sm_{capability:<3} {spec.num_warps:5}"
            try:
                used = compile_spec(spec, capability)
            except Exception as error:
                failures += 1
                print(f"{row} does not compile: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
                continue
            failures += used.spills > 0
            print(f"{row} {used.registers:9} {used.shared:8} {used.spills:7}", flush=True)
    print(f"{count} kernels compiled in {time.time() - start:.0f} s, {failures} failed or spilled")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
