"""Cases of `benchmarks.kernels`: rotary embedding, expert routing, and moving tokens to experts and back."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.kernels import KernelCase
from ds_llm.kernels.moe_routing import load_balancing_loss, permute, route, unpermute
from ds_llm.kernels.rope import apply_rope, rope_tables

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def cases(small: bool) -> Iterator[KernelCase]:
    dtype = torch.float32 if small else torch.bfloat16
    tokens = 1024 if small else 16384
    for q_heads, k_heads, head_dim in [(8, 2, 64)] if small else [(32, 8, 128), (28, 4, 128), (16, 16, 128)]:
        yield from rope_cases(tokens, q_heads, k_heads, head_dim, dtype)
    for experts, top_k in ((8, 2), (64, 8), (128, 8)) if small else ((8, 2), (64, 8), (128, 8), (512, 10)):
        yield from route_cases(4 * tokens, experts, top_k, dtype)
    for experts, top_k, hidden in [(8, 2, 512), (64, 8, 512)] if small else [(8, 2, 4096), (64, 8, 2048)]:
        yield from movement_cases(tokens, experts, top_k, hidden, dtype)
        yield grouped_experts_case(tokens // 4 if small else tokens, experts, top_k, hidden, dtype)


def with_gradients(outputs: tuple, leaves: tuple) -> tuple:
    """Outputs and the gradients of their sums."""
    return *outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])


def leaf(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


# --- rotary embedding


def rope_cases(tokens: int, q_heads: int, k_heads: int, head_dim: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def inputs(device: torch.device) -> tuple:
        q, k = (leaf(1, tokens, heads, head_dim, dtype=dtype, device=device) for heads in (q_heads, k_heads))
        return q, k, *(torch.cat([t, t], -1)[None].to(dtype) for t in rope_tables(tokens, head_dim, device=device))

    def functions(device: torch.device, finish) -> dict:
        q, k, cos, sin = inputs(device)

        def heads_first() -> tuple:
            return apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

        def eager() -> tuple:
            return finish(tuple(x.transpose(1, 2) for x in heads_first()), (q, k))

        found = {"ours": lambda: finish(apply_rope(q, k, cos, sin), (q, k)), "eager": eager}
        if device.type == "cuda":
            found |= liger_rope(q, k, cos, sin, finish)
        return found

    def build_forward(device: torch.device) -> dict:
        return functions(device, lambda outputs, leaves: tuple(x.detach() for x in outputs))

    def build_both(device: torch.device) -> dict:
        return functions(device, with_gradients)

    shape = f"T={tokens} Hq={q_heads} Hk={k_heads} D={head_dim} {NAMES[dtype]}"
    tables = 2 * tokens * head_dim // 2 * dtype.itemsize
    moved = 2 * tokens * (q_heads + k_heads) * head_dim * dtype.itemsize + tables
    yield KernelCase("rope", shape, moved, build_forward)
    yield KernelCase("rope + backward", shape, 2 * moved, build_both, compile=False)  # autograd.grad inside


def liger_rope(q, k, cos, sin, finish) -> dict:
    try:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb
    except ImportError:
        return {}

    def run() -> tuple:
        # it may rotate in place, so it gets copies where a comparison needs the inputs again
        out = liger_rotary_pos_emb(q.transpose(1, 2).clone(), k.transpose(1, 2).clone(), cos, sin)
        return finish(tuple(x.transpose(1, 2) for x in out), (q, k))

    return {"liger-kernel + copy": run}


# --- routing


def eager_route(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers' Qwen3-MoE router: weights [T, K] and the experts."""
    weights, experts = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), experts


def route_cases(tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    def build_forward(device: torch.device) -> dict:
        logits = leaf(tokens, experts, dtype=dtype, device=device).detach()
        return {
            "ours": lambda: route(logits, top_k)[0],
            "eager": lambda: eager_route(logits, top_k)[0],
        }

    def build_both(device: torch.device) -> dict:
        logits = leaf(tokens, experts, dtype=dtype, device=device)

        def ours() -> tuple:
            return with_gradients((route(logits, top_k)[0],), (logits,))

        return {
            "ours": ours,
            "eager": lambda: with_gradients((eager_route(logits, top_k)[0],), (logits,)),
        }

    def build_loss(device: torch.device) -> dict:
        logits = leaf(tokens, experts, dtype=dtype, device=device)

        def ours() -> tuple:
            weights, _, stats = route(logits, top_k)
            # transformers' loss counts every choice, so that it is top_k times as large
            return with_gradients((weights, top_k * load_balancing_loss(stats)), (logits,))

        def eager() -> tuple:
            weights, _ = eager_route(logits, top_k)
            return with_gradients((weights, load_balancing_loss_func((logits,), experts, top_k)), (logits,))

        return {"ours": ours, "eager": eager}

    shape = f"T={tokens} E={experts} K={top_k} {NAMES[dtype]}"
    choices, logits = 8 * tokens * top_k, tokens * experts * dtype.itemsize
    yield KernelCase("route", shape, logits + choices, build_forward)
    # backward: logits, experts and the gradients of the weights in, the gradient of the logits out
    both = logits + choices + 2 * logits + choices
    # the gradient sums to zero over a row of equal weight gradients: only rounding is left to compare
    yield KernelCase("route + backward", shape, both, build_both, tolerance=float("inf"), compile=False)
    yield KernelCase("route + balance loss + backward", shape, both, build_loss, tolerance=0.1, compile=False)


# --- movement


def eager_permute(x: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers' grouped experts: the rows [T * K, H] and where each choice went."""
    order = torch.sort(experts.reshape(-1), stable=True).indices
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return x[order // experts.shape[1]], inverse


def eager_unpermute(rows: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    weighted = rows[inverse].view(*weights.shape, -1) * weights[..., None]
    return weighted.sum(1).to(rows.dtype)


def movement_cases(tokens: int, experts: int, top_k: int, hidden: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    def inputs(device: torch.device) -> tuple:
        x = leaf(tokens, hidden, dtype=dtype, device=device)
        chosen = torch.rand(tokens, experts, device=device).topk(top_k).indices
        weights = torch.rand(tokens, top_k, device=device).requires_grad_()
        return x, chosen, weights

    def build_permute(device: torch.device) -> dict:
        x, chosen, _ = inputs(device)
        x.requires_grad_(False)
        chosen32 = chosen.int()
        return {"ours": lambda: permute(x, chosen32, experts)[0], "eager": lambda: eager_permute(x, chosen)[0]}

    def build_unpermute(device: torch.device) -> dict:
        x, chosen, weights = inputs(device)
        weights.requires_grad_(False)
        rows, _, inverse = permute(x.detach(), chosen, experts)
        flat = inverse.reshape(-1)
        return {
            "ours": lambda: unpermute(rows, inverse, weights),
            "eager": lambda: eager_unpermute(rows, flat, weights),
        }

    def build_both(device: torch.device) -> dict:
        x, chosen, weights = inputs(device)
        chosen32 = chosen.int()

        def ours() -> tuple:
            rows, _, inverse = permute(x, chosen32, experts)
            return with_gradients((unpermute(rows, inverse, weights),), (x, weights))

        def eager() -> tuple:
            rows, inverse = eager_permute(x, chosen)
            return with_gradients((eager_unpermute(rows, inverse, weights),), (x, weights))

        return {"ours": ours, "eager": eager}

    shape = f"T={tokens} E={experts} K={top_k} H={hidden} {NAMES[dtype]}"
    row = hidden * dtype.itemsize
    moved = tokens * ((1 + top_k) * row + 8 * top_k)
    yield KernelCase("permute", shape, moved, build_permute)
    yield KernelCase("unpermute", shape, moved, build_unpermute)
    # backward of unpermute: gradient and rows in, gradient of the rows out; backward of permute: as unpermute
    both = 3 * moved + tokens * ((1 + 2 * top_k) * row + 12 * top_k)
    yield KernelCase("permute + unpermute + backward", shape, both, build_both, compile=False)


def grouped_experts_case(tokens: int, experts: int, top_k: int, hidden: int, dtype: torch.dtype) -> KernelCase:
    """Whole experts, forward and backward: beside transformers' grouped experts, with the same grouped products."""
    width = hidden // 2

    def build(device: torch.device) -> dict:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        from ds_llm.models.moe import Experts

        config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=width, num_experts=experts)
        config._experts_implementation = "grouped_mm"
        theirs = Qwen3MoeExperts(config).to(device, dtype)
        ours = Experts(experts, hidden, width).to(device, dtype)
        with torch.no_grad():
            for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
                b.copy_(a.normal_(std=hidden**-0.5))
        x = leaf(tokens, hidden, dtype=dtype, device=device)
        weights, chosen, _ = route(torch.randn(tokens, experts, device=device), top_k)
        index = chosen.long()
        leaves = (x, *ours.parameters()), (x, *theirs.parameters())
        return {
            "ours": lambda: with_gradients((ours(x, weights, chosen),), leaves[0]),
            "eager": lambda: with_gradients((theirs(x, index, weights.to(dtype)),), leaves[1]),
        }

    shape = f"T={tokens} E={experts} K={top_k} H={hidden} {NAMES[dtype]}"
    row, parameters = dtype.itemsize, 3 * experts * hidden * width * dtype.itemsize
    # forward: token, rows, gate and up, their product, rows, token; twice that and the parameters in the backward pass
    moved = 3 * tokens * row * (2 * hidden + 2 * top_k * (2 * hidden + 3 * width)) + 3 * parameters
    return KernelCase(
        "experts + backward",
        shape,
        moved,
        build,
        flops=3 * 2 * tokens * top_k * 3 * hidden * width,
        dtype=dtype,
        compile=False,
    )
