"""Times every kernel beside its roofline, torch eager, torch.compile and the best public kernel that is installed.

`python -m benchmarks.kernels` runs at training sizes on a GPU. Without one it runs the torch references, which are the
CPU's kernels, at small sizes. `--bytes` prints what each kernel must move at training sizes and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch


@dataclass
class KernelCase:
    """One kernel at one shape.

    `build(device)` makes the inputs and returns named functions without arguments that do the same work: "ours" and
    "eager" (plain torch, which is also what torch.compile is given) always; any other name is a public kernel or a
    lower bound, built only where it is installed. Functions that return tensors are compared with "eager" before they
    are timed; those that work in place return None and are not.
    """

    kernel: str  # "rope forward"
    shape: str  # "T=16384 Hq=32 Hk=8 D=128 bf16"
    bytes: int  # that must move between memory and the chip: each input read once, each output written once
    build: Callable[[torch.device], dict[str, Callable[[], object]]]
    flops: int = 0  # of the matrix products, 2 M N K each; 0 for kernels that memory bounds
    dtype: torch.dtype = torch.bfloat16  # of the products, for their rate
    tolerance: float = 2e-2  # largest difference from "eager", over eager's largest magnitude
    compile: bool = True  # whether torch.compile takes "eager" (not where it breaks the graph or never returns)


@dataclass
class Row:
    kernel: str
    shape: str
    bytes: int
    flops: int
    microseconds: float
    roofline_microseconds: float
    others: dict[str, float] = field(default_factory=dict)  # microseconds of the other functions


def load_cases(small: bool) -> Iterator[KernelCase]:
    """What `cases(small)` of every benchmarks/kernel_cases_*.py yields, at sizes for a CPU or for training."""
    for file in sorted(Path(__file__).parent.glob("kernel_cases_*.py")):
        yield from importlib.import_module(f"benchmarks.{file.stem}").cases(small)


# --- measuring


def time_functions(functions: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict:
    """Median microseconds of each; on the CPU they take turns, so that a busy machine slows all of them alike."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return {name: 1e3 * do_bench(f, rep=int(1e3 * seconds), return_mode="median") for name, f in functions.items()}
    times = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or len(times["ours"]) < 3:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(found) for name, found in times.items()}


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes per second, read plus written, of a copy that no cache holds."""
    source = torch.empty((4 << 30) if device.type == "cuda" else (256 << 20), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    took = time_functions({"ours": lambda: target.copy_(source)}, device, seconds)["ours"]
    return 2 * source.numel() / (took * 1e-6)


def product_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Operations per second of a large square matrix product, 2 N^3 each."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / (time_functions({"ours": lambda: a @ b}, device, seconds)["ours"] * 1e-6)


def tensors_of(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result for t in tensors_of(part)] if isinstance(result, (tuple, list)) else []


def difference(result: object, expected: object) -> float:
    """Largest difference of any pair of tensors, over the largest magnitude of the expected one."""
    worst = 0.0
    for a, b in zip(tensors_of(result), tensors_of(expected), strict=True):
        if b.numel():
            gap = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)
            worst = max(worst, gap.item()) if gap == gap else float("inf")
    return worst


def measure(case: KernelCase, device: torch.device, rates: Rates, compiled: bool, seconds: float) -> Row:
    functions = case.build(device)
    if compiled and case.compile:
        functions["compile"] = torch.compile(functions["eager"], dynamic=False)
    expected = functions["eager"]()
    for name, function in functions.items():
        found = function()  # also the warm-up
        if name != "eager" and found is not None and expected is not None:
            gap = difference(found, expected)
            if gap > case.tolerance:
                raise SystemExit(f"{case.kernel} {case.shape}: {name} differs from eager by {gap:.2g}, not timed")
    times = time_functions(functions, device, seconds)
    ours = times.pop("ours")
    return Row(case.kernel, case.shape, case.bytes, case.flops, ours, rates.roofline(case), times)


class Rates:
    """Measured copy bandwidth, and the rate of matrix products of each dtype that a case needs."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.seconds = device, seconds
        self.bandwidth = copy_bandwidth(device, seconds)
        self.products: dict[torch.dtype, float] = {}

    def roofline(self, case: KernelCase) -> float:
        """Microseconds that the case's bytes or its products take at the measured rates, whichever is longer."""
        bound = case.bytes / self.bandwidth
        if case.flops:
            if case.dtype not in self.products:
                self.products[case.dtype] = product_rate(self.device, case.dtype, self.seconds)
            bound = max(bound, case.flops / self.products[case.dtype])
        return 1e6 * bound


# --- printing

NAME, SHAPE = 31, 34


def bytes_table(cases: Iterator[KernelCase]) -> None:
    print(f"{'kernel':{NAME}} {'shape':{SHAPE}} {'bytes that must move':>22} {'product GFLOP':>14}")
    for case in cases:
        product = f"{case.flops / 1e9:.1f}" if case.flops else "-"
        print(f"{case.kernel:{NAME}} {case.shape:{SHAPE}} {case.bytes:22,} {product:>14}")


def heading() -> str:
    columns = f"{'time us':>10} {'rate':>14} {'roofline us':>11} {'of roofline':>11} {'eager':>7} {'compile':>7}"
    return f"{'kernel':{NAME}} {'shape':{SHAPE}} {columns}  others"


def line(row: Row) -> str:
    def ratio(name: str) -> str:
        return f"{row.others[name] / row.microseconds:.2f}x" if name in row.others else "-"

    if row.flops:
        rate = f"{row.flops / row.microseconds / 1e6:.3g} TFLOP/s"
    else:
        rate = f"{row.bytes / row.microseconds / 1e3:.3g} GB/s"
    share = f"{row.roofline_microseconds / row.microseconds:.0%}"
    others = ", ".join(f"{name} {ratio(name)}" for name in row.others if name not in ("eager", "compile")) or "-"
    return (
        f"{row.kernel:{NAME}} {row.shape:{SHAPE}} {row.microseconds:10.1f} {rate:>14} "
        f"{row.roofline_microseconds:11.1f} {share:>11} {ratio('eager'):>7} {ratio('compile'):>7}  {others}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--bytes", action="store_true", help="print byte counts at training sizes; measure nothing")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    parser.add_argument("--kernel", nargs="+", metavar="WORD", help="only kernels whose name has one of these in it")
    parser.add_argument("--seconds", type=float, default=0.2, help="spent on timing each function (default 0.2)")
    parser.add_argument("--small", action="store_true", help="small sizes also on a GPU")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="also time torch.compile of eager (default: on a GPU)",
    )
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = not args.bytes and (args.small or device.type == "cpu")
    cases = [c for c in load_cases(small) if args.kernel is None or any(word in c.kernel for word in args.kernel)]
    if not cases:
        parser.error(f"no kernel's name has any of: {' '.join(args.kernel)}")
    if args.bytes:
        bytes_table(iter(cases))
        return

    from benchmarks.machine import record

    about = record()
    if device.type == "cuda":
        print(f"Triton kernels on {about['machine']['gpus'][0]['name']}")
    else:
        threads = about["machine"]["threads"]
        print(f"torch reference paths on {about['machine']['cpu']}, {threads} threads: no Triton kernel is timed here")
        print("small sizes stay in the processor's cache: shares of the roofline above 100 % mean that")
    rates = Rates(device, args.seconds)
    print(f"copy bandwidth {rates.bandwidth / 1e9:.3g} GB/s; eager, compile and others: their time / ours")
    print(heading())
    rows = []
    for case in cases:
        rows.append(measure(case, device, rates, args.compile, args.seconds))
        print(line(rows[-1]), flush=True)
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if args.json:
        products = {str(dtype): rate for dtype, rate in rates.products.items()}
        measured = {
            "measured": "Triton kernels" if device.type == "cuda" else "torch reference paths on the CPU",
            "copy_bytes_per_second": rates.bandwidth,
            "product_flops_per_second": products,
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(about | measured, indent=2) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    sys.exit(main())
