"""Statistics of a language model's output distribution, straight from hidden states: entropy, log-probability, top-1.

The logits ``hidden @ weight.T`` exist one chunk of tokens at a time, in the input's dtype. Each is read once after the
matrix product, by an online pass over the vocabulary (Milakov & Gimelshein 2018, "Online normalizer calculation for
softmax", arXiv:1805.02867) that carries the maximum, ``sum exp`` and ``sum x exp``. With T tokens, hidden size H, V
words and elements of b bytes it moves b (T H + V H + 2 T V) bytes: the logits are written by the product, then read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import jit, launch_on, tl, uses_triton
from .compile_check import CompileSpec
from .cross_entropy_rows import accumulate_dtype, capped, vocab_block
from .linear_cross_entropy import chunk_rows, linear_cross_entropy

__all__ = ["TokenStats", "linear_cross_entropy", "linear_token_stats"]

IGNORE = -100
TILE_TOKENS, TILE_VOCAB = 512, 1024  # a float32 tile of logits and its exponentials stay in a 2-4 MiB L2 cache
# of a thread, with labels: three programs of 8 warps fit a multiprocessor; unasked, ptxas may aim at four and spill
REGISTERS = 80
MASKED = -1e30  # stands for -inf where inf - inf would make NaN


class TokenStats(NamedTuple):
    """Per token, in nats, float32 (float64 for float64 input); without labels `logprob` and `hit` are None."""

    entropy: Tensor  # [T], -sum_v p_v log p_v
    logprob: Tensor | None  # [T], log p[label]; 0 where the label is ignored
    logsumexp: Tensor  # [T], of the logits after softcap and temperature
    hit: Tensor | None  # [T] bool: the label is the arg max (ties go to the lower index); False where ignored


# --- torch reference


def _tile_sums(x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max m, sum exp(x - m) and sum (x - m) exp(x - m) of the rows of `x` [T, V], which is overwritten."""
    m = x.amax(1).clamp_(min=MASKED)
    x.sub_(m[:, None])
    e = torch.exp(x, out=scratch)
    s = e.sum(1)
    t = e.mul_(x).sum(1)
    if not bool(torch.isfinite(t).all()):  # 0 * -inf: some logits are masked
        t = torch.exp(x.clamp_(min=-1e4), out=scratch).mul_(x).sum(1)
    return m, s, t


def token_stats_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tiles of [rows, TILE_VOCAB] logits, summed in float32; each tile's sums are merged at the end of its rows."""
    T, V = hidden.shape[0], weight.shape[0]
    acc = accumulate_dtype(hidden.dtype)
    entropy, lse, logprob = (torch.zeros(T, dtype=acc, device=hidden.device) for _ in range(3))
    hit = torch.zeros(T, dtype=torch.bool, device=hidden.device)
    tile = torch.empty(min(rows, T), TILE_VOCAB, dtype=hidden.dtype, device=hidden.device)
    scratch = torch.empty_like(tile, dtype=acc)
    for i in range(0, T, rows):
        h = hidden[i : i + rows]
        lab = None if labels is None else labels[i : i + rows]
        sums = []
        label_logit = torch.full((len(h),), torch.nan, dtype=acc, device=h.device)
        first, label_tile = (torch.zeros(len(h), dtype=d, device=h.device) for d in (bool, int))
        for j in range(0, V, TILE_VOCAB):
            w = weight[j : j + TILE_VOCAB]
            n = w.shape[0]
            flat = tile.view(-1)[: len(h) * n].view(len(h), n)
            x = torch.mm(h, w.t(), out=flat).to(acc)
            if bias is not None:
                x += bias[j : j + n]
            if softcap is not None:
                x.div_(softcap).tanh_().mul_(softcap)
            if temperature != 1.0:
                x.div_(temperature)
            if lab is not None:
                here = ((lab >= j) & (lab < j + n)).nonzero().squeeze(1)
                if here.numel():
                    column = lab[here] - j
                    picked = x[here]
                    label_logit[here] = picked.gather(1, column[:, None]).squeeze(1)
                    first[here] = picked.argmax(1) == column
                    label_tile[here] = j // TILE_VOCAB
            sums.append(_tile_sums(x, scratch.view(-1)[: len(h) * n].view(len(h), n)))
        m, s, t = (torch.stack(part, 1) for part in zip(*sums, strict=True))
        top, best = m.max(1)
        shift = m - top[:, None]
        scale = shift.exp()
        t = ((t + s * shift) * scale).sum(1)
        s = (s * scale).sum(1)
        out = slice(i, i + len(h))
        log_sum = s.log()
        lse[out] = top + log_sum
        entropy[out] = log_sum - t / s
        if lab is not None:
            valid = lab != IGNORE
            logprob[out] = torch.where(valid, (label_logit - top) - log_sum, 0)  # exact for logits near +-1e4 too
            hit[out] = first & (label_tile == best) & valid
    return entropy, logprob, lse, hit


# --- Triton kernel


@jit
def _token_stats_kernel(
    logits,
    labels,
    bias,
    entropy,
    logprob,
    logsumexp,
    hit,
    row_stride,
    vocabulary,
    softcap,
    temperature,
    LABELS: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    IGNORE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    if LABELS:
        label = tl.load(labels + row)
        ignored = label == IGNORE
        inside = (label >= 0) & (label < vocabulary)
        target = capped(logits + label, bias + label, inside, softcap, BIAS, SOFTCAP)
        if TEMPERATURE:
            target = target / temperature
        target = tl.where(inside, target, float("nan"))
        floor = tl.maximum(target, MASKED)  # what the maximum is when the label's logit is the largest
        label = label.to(tl.int32)  # of one outside, nothing below matters
    m = tl.full([], MASKED, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    t = tl.zeros([BLOCK], tl.float32)
    before = tl.zeros([], tl.int32)  # 1 when a word with a lower index has the label's logit
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = capped(logits + column, bias + column, column < vocabulary, softcap, BIAS, SOFTCAP)
        if TEMPERATURE:
            x = x / temperature
        top = tl.maximum(m, tl.max(x, 0))
        if LABELS:  # noqa: SIM102  (this is known when compiling, the next is not)
            # in a branch that few steps take: noting it for every logit takes 16 more registers of a thread
            if (top == floor) & (start < label):
                before |= tl.max(((x == target) & (column < label)).to(tl.int32), 0)
        shift = m - top
        scale = tl.exp(shift)
        x -= top
        e = tl.exp(x)
        t = (t + s * shift) * scale + tl.where(e > 0, x * e, 0.0)  # 0 * -inf is NaN
        s = s * scale + e
        m = top
    total = tl.sum(s, 0)
    log_sum = tl.log(total)
    tl.store(logsumexp + row, m + log_sum)
    tl.store(entropy + row, log_sum - tl.sum(t, 0) / total)
    if LABELS:
        tl.store(logprob + row, tl.where(ignored, 0.0, (target - m) - log_sum))
        tl.store(hit + row, inside & (m <= floor) & (before == 0))


def token_stats_triton(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, V = hidden.shape[0], weight.shape[0]
    entropy, logprob, lse, hit = outputs = _outputs(hidden)
    if labels is None:
        logprob.zero_()
        hit.zero_()
    buffer = torch.empty(min(rows, T), V, dtype=hidden.dtype, device=hidden.device)
    block, warps = vocab_block(V)
    for i in range(0, T, rows):
        h = hidden[i : i + rows]
        part = slice(i, i + len(h))
        logits = torch.mm(h, weight.t(), out=buffer[: len(h)])
        with launch_on(logits):
            _token_stats_kernel[(len(h),)](
                logits,
                lse if labels is None else labels[part],
                logits if bias is None else bias,
                entropy[part],
                logprob[part],
                lse[part],
                hit[part],
                logits.stride(0),
                V,
                1.0 if softcap is None else softcap,
                temperature,
                LABELS=labels is not None,
                BIAS=bias is not None,
                SOFTCAP=softcap is not None,
                TEMPERATURE=temperature != 1.0,
                IGNORE=IGNORE,
                MASKED=MASKED,
                BLOCK=block,
                num_warps=warps,
                maxnreg=None if labels is None else REGISTERS,
            )
    return outputs


def compile_specs() -> list[CompileSpec]:
    specs = []
    results = dict.fromkeys(("entropy", "logprob", "logsumexp"), "*fp32") | {"hit": "*i1"}
    sizes = {"row_stride": "i64", "vocabulary": "i32", "softcap": "fp32", "temperature": "fp32"}
    for dtype in ("bf16", "fp16", "fp32"):
        for vocabulary in (6400, 151936):
            block, warps = vocab_block(vocabulary)
            for name, labels, bias, softcap, temperature in (
                ("labels", True, False, False, False),
                ("no labels", False, False, False, True),
                ("bias softcap", True, True, True, True),
            ):
                flags = {"LABELS": labels, "BIAS": bias, "SOFTCAP": softcap, "TEMPERATURE": temperature}
                constants = flags | {"IGNORE": IGNORE, "MASKED": MASKED, "BLOCK": block}
                signature = {"logits": f"*{dtype}", "bias": f"*{dtype}", "labels": "*i64"} | results | sizes
                label = f"token stats {dtype} V={vocabulary} {name}"
                registers = REGISTERS if labels else None
                specs.append(CompileSpec(label, _token_stats_kernel, signature, constants, warps, 3, registers))
    return specs


# --- torch.library


def _outputs(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulate_dtype(hidden.dtype)
    entropy, logprob, lse = (hidden.new_empty(hidden.shape[0], dtype=acc) for _ in range(3))
    return entropy, logprob, lse, hidden.new_empty(hidden.shape[0], dtype=torch.bool)


@torch.library.custom_op("ds_llm::linear_token_stats", mutates_args=())
def _linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels, bias = (None if t is None else t.contiguous() for t in (labels, bias))
    if uses_triton(hidden):
        rows = rows or chunk_rows(hidden, weight)
        return token_stats_triton(hidden, weight, labels, bias, softcap, temperature, rows)
    return token_stats_reference(hidden, weight, labels, bias, softcap, temperature, rows or TILE_TOKENS)


@_linear_token_stats.register_fake
def _(hidden, weight, labels, bias, softcap, temperature, rows):
    return _outputs(hidden)


# --- public functions


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor | None, bias: Tensor | None, temperature: float, chunk: int | None
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [T, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them")
    if labels is not None and labels.shape != hidden.shape[:1]:
        raise ValueError(f"expected labels [{hidden.shape[0]}], got {list(labels.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias [{weight.shape[0]}], got {list(bias.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")


@torch.no_grad()
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> TokenStats:
    """Entropy, label log-probability, log-sum-exp and top-1 hit of softmax(logits), for every token.

    logits = softcap(hidden @ weight.T + bias) / temperature, where softcap c replaces x by c * tanh(x / c). hidden
    [T, H] and weight [V, H] of one floating dtype (under autocast both are cast to its dtype); labels [T] integers in
    [0, V), -100 to ignore: hidden[i] is scored against labels[i] (no shift). chunk: tokens whose logits exist at a
    time (chosen by size otherwise). No gradient. A label outside [0, V) has logprob NaN and no hit. Raises ValueError
    when shapes or dtypes do not match.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    _check(hidden, weight, labels, bias, temperature, chunk)
    if labels is not None:
        labels = labels.long()
    entropy, logprob, lse, hit = _linear_token_stats(hidden, weight, labels, bias, softcap, temperature, chunk)
    return TokenStats(entropy, None if labels is None else logprob, lse, None if labels is None else hit)
