"""Packed attention: which implementation runs, and its time against causal and variable-length attention."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from contextvars import copy_context
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import kernels
from benchmarks.gpu_check.basics import device
from benchmarks.gpu_check.report import Place, Report
from ds_llm.compat.transformers import ALL_ATTENTION_FUNCTIONS, choose_attention, chosen_attention
from ds_llm.models.isolation import isolate, run_backbone

GPU = {"rows": 4, "length": 4096, "heads": 16, "key_heads": 8, "head_dim": 128, "document": 700, "seconds": 0.1}
TOY = {"rows": 2, "length": 128, "heads": 4, "key_heads": 2, "head_dim": 16, "document": 30, "seconds": 0.005}


def attention(report: Report, place: Place) -> None:
    """Forward and backward pass of one attention, as a layer of the decoder calls it, and of the alternatives."""
    sizes, where = TOY if place.toy else GPU, device()
    positions = packed_positions(sizes)
    one = torch.arange(sizes["length"]).expand(sizes["rows"], -1)
    documents = int((positions == 0).sum())
    report.figures(rows=sizes["rows"], length=sizes["length"], documents=documents, heads=sizes["heads"])
    model = decoder(sizes, where)
    report.figures(attention=chosen_attention(model.config))
    ours: dict[str, Callable] = {}
    for name, given in (("ours, packed documents", positions), ("ours, one document a row", one)):
        ours[name], kernel, mask = captured(model, given.to(where))
        report.row("calls", attention=name, kernel=kernel, mask=mask, operators=operators(ours[name], where))
    q, k, v = (
        torch.randn(sizes["rows"], sizes["length"], heads, sizes["head_dim"], device=where, dtype=torch.bfloat16)
        for heads in (sizes["heads"], sizes["key_heads"], sizes["key_heads"])
    )
    bounds = F.pad((positions.reshape(-1) == 0).nonzero().view(-1), (0, 1), value=positions.numel())
    bounds = bounds.to(where, torch.int32)
    times = {}
    for name, call in (alternatives(q, k, v, bounds) | ours).items():
        try:
            call()
            times[name] = kernels.time_functions({"ours": call}, where, sizes["seconds"])["ours"]
        except Exception as error:  # a backend that cannot: it is a finding
            report.row("time", attention=name, us=None, error=str(error).strip().split("\n")[0][:200])
        else:
            flash = times.get("causal, flash")
            report.row("time", attention=name, us=times[name], of_causal_flash=flash and times[name] / flash)
    layers = {"packed": positions, "one document a row": one}
    for name, given in layers.items():
        report.row("one layer, forward and backward", positions=name, ms=layer_ms(model, given.to(where), sizes))


def packed_positions(sizes: dict) -> Tensor:
    """Positions [rows, length] that restart at random places, `document` tokens apart on average."""
    starts = torch.rand(sizes["rows"], sizes["length"], generator=torch.Generator().manual_seed(0))
    starts = starts < 1 / sizes["document"]
    starts[:, 0] = True
    index = torch.arange(sizes["length"]).expand_as(starts)
    return index - torch.where(starts, index, 0).cummax(1).values


def decoder(sizes: dict, where: torch.device):
    """One layer of the decoder in bf16, with the attention that training chooses."""
    from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM
    from ds_llm.pretrained.loading import attention_kernel

    config = DecoderConfig(
        vocab_size=512,
        hidden_size=sizes["heads"] * sizes["head_dim"],
        num_hidden_layers=1,
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["key_heads"],
        max_position_embeddings=sizes["length"],
    )
    choose_attention(config, attention_kernel("auto", "bf16"))
    return DecoderForCausalLM(config).to(where, torch.bfloat16).train()


def hidden(model, positions: Tensor) -> Tensor:
    return run_backbone(model, torch.ones_like(positions), positions).last_hidden_state


def captured(model, positions: Tensor) -> tuple[Callable, str, str]:
    """The call of the attention function that the model makes for these positions, with its backward pass, as a
    function without arguments; the function's name in transformers, and what mask it is given."""
    isolate(model)
    found = []

    def noting(name: str, original: Callable) -> Callable:
        def note(*args, **kwargs):
            found.append((name, original, args, kwargs, copy_context()))  # which holds the packed documents
            return original(*args, **kwargs)

        return note

    names = {chosen_attention(model.config), model.packing_way.kernel}
    for name in names:
        ALL_ATTENTION_FUNCTIONS[name] = noting(name, ALL_ATTENTION_FUNCTIONS[name])
    try:
        hidden(model, positions)
    finally:
        for name in names:
            del ALL_ATTENTION_FUNCTIONS[name]  # the entry of its own; the library's shows again
    name, original, (module, q, k, v, mask, *rest), kwargs, context = found[0]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    shown = "none" if mask is None else f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
    if "cu_seq_lens_q" in kwargs:
        shown += f", lengths of {len(kwargs['cu_seq_lens_q']) - 1} documents"

    def call() -> None:
        context.run(both, lambda *x: original(module, *x, mask, *rest, **kwargs)[0], *leaves)

    return call, name, shown


def both(function: Callable, *leaves: Tensor) -> None:
    out = function(*leaves)
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def operators(call: Callable, where: torch.device) -> list[str]:
    """Names of the operators for attention that a call runs, and on a GPU of its three longest kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if where.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    call()
    with torch.profiler.profile(activities=activities) as trace:
        call()
    events = trace.key_averages()
    names = sorted({e.key for e in events if e.key.startswith("aten::_") and "attention" in e.key})
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    longest = sorted(on_device, key=lambda e: -e.self_device_time_total)[:3]
    return [name.removeprefix("aten::") for name in names] + [e.key[:60] for e in longest]


def alternatives(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> dict[str, Callable]:
    """The same sizes [rows, length, heads, head_dim]: causal over whole rows, and variable-length kernels."""
    heads = q.shape[2]
    found: dict[str, Callable] = {}
    whole = [x.transpose(1, 2).contiguous().requires_grad_() for x in (q, *(repeated(x, heads) for x in (k, v)))]

    def causal() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            both(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), *whole)

    found["causal, flash"] = causal
    number = torch.bucketize(torch.arange(q.shape[0] * q.shape[1], device=q.device), bounds[1:], right=True)
    number = number.view(q.shape[:2])
    mask = (number[:, None, :, None] == number[:, None, None]) & torch.ones(
        q.shape[1], q.shape[1], dtype=torch.bool, device=q.device
    ).tril()
    found["documents under a mask"] = lambda: both(
        lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask), *whole
    )
    longest, flat = int(bounds.diff().max()), [x.flatten(0, 1).requires_grad_() for x in (q, k, v)]
    if q.device.type == "cuda":
        alike = [flat[0], *(repeated(x[None], heads)[0].detach().requires_grad_() for x in flat[1:])]

        def torch_varlen() -> None:
            from torch.nn.attention.varlen import varlen_attn

            # how it is told to be causal changed from one release of torch to the next
            flag = "is_causal" in inspect.signature(varlen_attn).parameters
            options = {"is_causal": True} if flag else {"window_size": (-1, 0)}
            both(lambda *x: varlen_attn(*x, bounds, bounds, longest, longest, **options), *alike)

        found["variable-length, torch"] = torch_varlen
    if find_spec("flash_attn"):

        def flash_varlen() -> None:
            from flash_attn import flash_attn_varlen_func

            both(lambda *x: flash_attn_varlen_func(*x, bounds, bounds, longest, longest, causal=True), *flat)

        found["variable-length, flash-attn"] = flash_varlen
    return found


def repeated(x: Tensor, heads: int) -> Tensor:
    """[B, T, key heads, D] with each head as often as queries share it."""
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def layer_ms(model, positions: Tensor, sizes: dict) -> float:
    """Median milliseconds of the layer with its mask, forward and backward."""

    def step() -> None:
        hidden(model, positions).sum().backward()
        if positions.is_cuda:
            torch.cuda.synchronize()

    step()
    times, end = [], time.perf_counter() + 2 * sizes["seconds"]
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]
