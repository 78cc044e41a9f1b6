"""Cases of `benchmarks.kernels`: sparse updates and token statistics."""

from collections.abc import Iterator

import torch

from benchmarks.kernels import KernelCase
from ds_llm.kernels.sparse_update import PackedMask, compact, expand, masked_adamw_, masked_adamw_dense_
from ds_llm.kernels.token_stats import linear_cross_entropy, linear_token_stats

LEARNING = {"lr": 1e-3, "weight_decay": 0.01}


def cases(small: bool) -> Iterator[KernelCase]:
    rows, columns = (1024, 1024) if small else (8192, 8192)
    dtype = torch.float32 if small else torch.bfloat16
    for density in (0.1, 0.5):
        yield from sparse_cases(rows, columns, density, dtype)
    large = (16384, 2048, 151936), (16384, 4096, 128256), (4096, 4096, 128256)
    for tokens, hidden, vocabulary in [(512, 256, 8192)] if small else large:
        yield stats_case(tokens, hidden, vocabulary, dtype)
        yield cross_entropy_case(tokens, hidden, vocabulary, dtype)


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


# --- sparse updates


def sparse_cases(rows: int, columns: int, density: float, dtype: torch.dtype) -> Iterator[KernelCase]:
    kept, element = round(density * rows * columns), dtype.itemsize
    mask_bytes = rows * columns // 8 + 8 * rows
    shape = f"{rows} x {columns}, density {density}, {short(dtype)}"

    def inputs(device: torch.device) -> tuple:
        chosen = torch.rand(rows, columns, device=device) < density
        dense = torch.randn(rows, columns, device=device).to(dtype)
        packed = PackedMask.from_dense(chosen)
        return chosen, packed, dense, compact(dense, packed)

    def build_expand(device: torch.device) -> dict:
        chosen, packed, _, values = inputs(device)
        return {
            "ours": lambda: expand(values, packed),
            "eager": lambda: torch.zeros(rows, columns, dtype=dtype, device=device).masked_scatter_(chosen, values),
        }

    def build_compact(device: torch.device) -> dict:
        chosen, packed, dense, _ = inputs(device)
        return {"ours": lambda: compact(dense, packed), "eager": lambda: dense.masked_select(chosen)}

    def states(weight: torch.Tensor) -> tuple:
        return weight, torch.randn_like(weight), *(torch.zeros_like(weight, dtype=torch.float32) for _ in range(2))

    def build_adamw(device: torch.device) -> dict:
        *_, values = inputs(device)
        ours = states(values)
        plain = states(values.clone())
        return {
            "ours": lambda: masked_adamw_(*ours, step=10, **LEARNING),
            "eager": lambda: eager_adamw(*plain),
        }

    def build_adamw_dense(device: torch.device) -> dict:
        chosen, packed, dense, _ = inputs(device)
        ours = states(dense)
        plain = states(dense.clone())
        return {
            "ours": lambda: masked_adamw_dense_(*ours, mask=packed, step=10, **LEARNING),
            "eager": lambda: eager_adamw(*plain, chosen),
        }

    # masked_select and masked_scatter_ have sizes that depend on data: torch.compile breaks the graph there
    yield KernelCase("expand", shape, kept * element + mask_bytes + rows * columns * element, build_expand)
    yield KernelCase(
        "compact", shape, rows * columns * element + mask_bytes + kept * element, build_compact, compile=False
    )
    yield KernelCase("masked AdamW, values", shape, kept * (3 * element + 16), build_adamw)
    moved = rows * columns * (3 * element + 16) + rows * columns // 8
    yield KernelCase("masked AdamW, dense", shape, moved, build_adamw_dense)


def eager_adamw(param, grad, exp_avg, exp_avg_sq, mask=None) -> None:
    """The same step in torch operations; pruned weights are put back."""
    g = grad.float()
    m, v = exp_avg.lerp(g, 0.1), exp_avg_sq.lerp(g * g, 0.001)
    p = param.float() * (1 - LEARNING["lr"] * LEARNING["weight_decay"])
    p = p - LEARNING["lr"] / (1 - 0.9**10) * m / ((v / (1 - 0.999**10)).sqrt() + 1e-8)
    for target, new in ((param, p), (exp_avg, m), (exp_avg_sq, v)):
        target.copy_(new if mask is None else torch.where(mask, new.to(target.dtype), target))


# --- token statistics


def head_inputs(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> tuple:
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    weight = (torch.randn(vocabulary, hidden, device=device) * 2 / hidden**0.5).to(dtype)
    return x, weight, torch.randint(vocabulary, (tokens,), device=device)


def head_bytes(tokens: int, hidden: int, vocabulary: int, element: int) -> int:
    """Hidden states and weight read, logits written by the product and read once, four float32 results."""
    return element * (tokens * hidden + vocabulary * hidden + 2 * tokens * vocabulary) + 16 * tokens


def stats_case(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> KernelCase:
    def build(device: torch.device) -> dict:
        x, weight, labels = head_inputs(tokens, hidden, vocabulary, dtype, device)
        rows = torch.arange(tokens, device=device)

        def eager() -> tuple:
            logp = torch.log_softmax(torch.mm(x, weight.t()), -1, dtype=torch.float32)
            return -(logp.exp() * logp).sum(-1), logp[rows, labels]

        def product() -> None:
            for part in x.split(512):
                part @ weight.t()

        return {
            "ours": lambda: tuple(linear_token_stats(x, weight, labels)[:2]),
            "eager": eager,
            "product alone": product,
        }

    return KernelCase(
        "linear token statistics",
        f"T={tokens} H={hidden} V={vocabulary} {short(dtype)}",
        head_bytes(tokens, hidden, vocabulary, dtype.itemsize),
        build,
        flops=2 * tokens * hidden * vocabulary,
        dtype=dtype,
    )


def cross_entropy_case(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> KernelCase:
    def build(device: torch.device) -> dict:
        x, weight, labels = head_inputs(tokens, hidden, vocabulary, dtype, device)
        x.requires_grad_()
        weight.requires_grad_()

        def with_gradients(loss) -> tuple:
            return loss, *torch.autograd.grad(loss, (x, weight))

        def eager() -> tuple:
            return with_gradients(torch.nn.functional.cross_entropy((x @ weight.t()).float(), labels))

        functions = {"ours": lambda: with_gradients(linear_cross_entropy(x, weight, labels)), "eager": eager}
        if device.type == "cuda":
            functions |= public_cross_entropies(x, weight, labels, with_gradients)
        return functions

    # the logits' gradient is written over them: written by the product, read and written by the loss, read twice
    element = dtype.itemsize
    moved = element * (2 * tokens * hidden + 2 * vocabulary * hidden + 5 * tokens * vocabulary)
    return KernelCase(
        "linear cross-entropy + backward",
        f"T={tokens} H={hidden} V={vocabulary} {short(dtype)}",
        moved,
        build,
        flops=6 * tokens * hidden * vocabulary,
        dtype=dtype,
        compile=False,  # autograd.grad inside
    )


def public_cross_entropies(x, weight, labels, with_gradients) -> dict:
    found = {}
    try:
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut-cross-entropy"] = lambda: with_gradients(cut(x, weight, labels))
    except ImportError:
        pass
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger-kernel"] = lambda: with_gradients(liger(weight, x, labels))
    except ImportError:
        pass
    return found
