"""Cross-entropy of a linear head, straight from hidden states: the logits exist one chunk of tokens at a time.

With reduction "sum" or "mean" the gradients are formed in the forward pass while a chunk's logits are at hand (as in
Liger-Kernel's fused linear cross-entropy, arXiv:2410.10989): three matrix products in all, nothing but the gradients
is saved, and the weight is not touched in backward, so a ZeRO-3 shard is gathered once. With "none" the upstream
gradient of each token is not known yet, so backward recomputes the logits (four products).
With T tokens, hidden size H, V words and elements of b bytes: b (2 T H + 2 V H + 5 T V) bytes and 6 T H V operations.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cross_entropy_rows import accumulate_dtype, cross_entropy_rows

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
FP16_SCALE = 4096.0  # keeps probabilities below fp16's smallest number (6e-8) alive through the matrix products


def _gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gradients before the upstream gradient multiplies them: a loss scale overruns fp16."""
    return torch.float32 if dtype == torch.float16 else dtype


def chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    """Tokens whose logits exist at a time."""
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"])
    return max(128, budget // (weight.shape[0] * hidden.element_size()) // 128 * 128)


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    z_loss: float,
    upstream: Tensor | None,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Loss [T] of rows that all have a label, and the gradients of sum(upstream * loss) that `need` asks for.

    Gradients accumulate in float32; they come back in float32 for fp16 input (whose range a loss scale overruns or a
    small gradient underruns), else in the input's dtype.
    """
    T, V = hidden.shape[0], weight.shape[0]
    dtype, acc = hidden.dtype, accumulate_dtype(hidden.dtype)
    saved = _gradient_dtype(dtype)
    rows = min(chunk_rows(hidden, weight), max(T, 1))
    losses = torch.empty(T, dtype=acc, device=hidden.device)
    need_hidden, need_weight, need_bias = need
    grad_hidden = torch.empty(hidden.shape, dtype=saved, device=hidden.device) if need_hidden else None
    grad_weight = torch.zeros(weight.shape, dtype=acc, device=hidden.device) if need_weight else None
    grad_bias = torch.zeros(V, dtype=acc, device=hidden.device) if need_bias else None
    scale = (FP16_SCALE if dtype == torch.float16 else 1.0) if any(need) else None
    buffer = torch.empty(rows, V, dtype=dtype, device=hidden.device)
    for i in range(0, T, rows):
        h = hidden[i : i + rows]
        part = slice(i, i + len(h))
        logits = torch.mm(h, weight.t(), out=buffer[: len(h)])
        losses[part] = cross_entropy_rows(
            logits, labels[part], bias, softcap, z_loss, None if upstream is None else upstream[part], scale
        )
        if need_hidden:
            grad_hidden[part] = _product(logits, weight, dtype) / scale if scale != 1.0 else logits @ weight
        if need_weight:
            if dtype == acc:
                grad_weight.addmm_(logits.t(), h)
            else:
                grad_weight += _product(logits.t(), h, dtype)
        if need_bias:
            grad_bias += logits.sum(0, dtype=acc)
    if scale is not None and scale != 1.0:
        for grad in (grad_weight, grad_bias):
            if grad is not None:
                grad.div_(scale)
    return (
        losses,
        grad_hidden,
        None if grad_weight is None else grad_weight.to(saved),
        None if grad_bias is None else grad_bias.to(saved),
    )


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b; in float32 for fp16, whose sums over tokens may pass 65504."""
    if dtype != torch.float16:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _compute(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    z_loss: float,
    ignore_index: int,
    upstream: Tensor | None,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_chunks` over the rows that have a label: ignored tokens cost no product. Their loss and gradient are 0.

    Gradients that `need` does not ask for are empty.
    """
    labels, bias, upstream = (None if t is None else t.contiguous() for t in (labels, bias, upstream))
    keep = (labels != ignore_index).nonzero().squeeze(1)
    partial = keep.numel() < labels.numel()
    if partial:
        upstream = None if upstream is None else upstream[keep]
        full, hidden, labels = hidden, hidden[keep], labels[keep]
    losses, *grads = _chunks(hidden, weight, labels, bias, softcap, z_loss, upstream, need)
    if partial:
        losses = losses.new_zeros(full.shape[0]).index_copy_(0, keep, losses)
        if grads[0] is not None:
            grads[0] = grads[0].new_zeros(full.shape).index_copy_(0, keep, grads[0])
    return losses, *(hidden.new_empty(0) if g is None else g for g in grads)


# --- torch.library


def _fake_gradients(hidden: Tensor, weight: Tensor, need: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtype = _gradient_dtype(hidden.dtype)
    return tuple(
        hidden.new_empty(shape, dtype=dtype) if needed else hidden.new_empty(0)
        for shape, needed in zip(shapes, need, strict=True)
    )


@torch.library.custom_op("ds_llm::linear_cross_entropy_sum", mutates_args=())
def _summed(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    z_loss: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need = (need_hidden, need_weight, need_bias)
    losses, *grads = _compute(hidden, weight, labels, bias, softcap, z_loss, ignore_index, None, need)
    return losses.sum(), *grads


@_summed.register_fake
def _(hidden, weight, labels, bias, softcap, z_loss, ignore_index, need_hidden, need_weight, need_bias):
    loss = hidden.new_empty((), dtype=accumulate_dtype(hidden.dtype))
    return loss, *_fake_gradients(hidden, weight, (need_hidden, need_weight, need_bias))


def _save_gradients(ctx, inputs, output):
    ctx.dtypes = [None if t is None else t.dtype for t in (inputs[0], inputs[1], inputs[3])]
    ctx.need = inputs[-3:]
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


@once_differentiable
def _scale_gradients(ctx, upstream, *_):
    gh, gw, gb = (
        (grad * upstream).to(dtype) if needed and upstream is not None else None
        for grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.need, strict=True)
    )
    return gh, gw, None, gb, None, None, None, None, None, None


_summed.register_autograd(_scale_gradients, setup_context=_save_gradients)


@torch.library.custom_op("ds_llm::linear_cross_entropy_tokens", mutates_args=())
def _per_token(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    z_loss: float,
    ignore_index: int,
) -> Tensor:
    need = (False, False, False)
    return _compute(hidden, weight, labels, bias, softcap, z_loss, ignore_index, None, need)[0]


@_per_token.register_fake
def _(hidden, weight, labels, bias, softcap, z_loss, ignore_index):
    return hidden.new_empty(hidden.shape[0], dtype=accumulate_dtype(hidden.dtype))


@torch.library.custom_op("ds_llm::linear_cross_entropy_tokens_backward", mutates_args=())
def _per_token_backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    z_loss: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    need = (need_hidden, need_weight, need_bias)
    return _compute(hidden, weight, labels, bias, softcap, z_loss, ignore_index, upstream, need)[1:]


@_per_token_backward.register_fake
def _(upstream, hidden, weight, labels, bias, softcap, z_loss, ignore_index, need_hidden, need_weight, need_bias):
    return _fake_gradients(hidden, weight, (need_hidden, need_weight, need_bias))


def _save_inputs(ctx, inputs, output):
    hidden, weight, labels, bias, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, labels, bias)


@once_differentiable
def _recompute(ctx, upstream):
    hidden, weight, labels, bias = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = _per_token_backward(upstream, hidden, weight, labels, bias, *ctx.options, *need)
    gh, gw, gb = (
        grad.to(t.dtype) if needed else None
        for grad, t, needed in zip(grads, (hidden, weight, bias), need, strict=True)
    )
    return gh, gw, None, gb, None, None, None


_per_token.register_autograd(_recompute, setup_context=_save_inputs)


# --- public function


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of softcap(hidden @ weight.T + bias) against labels, without ever holding all logits.

    hidden [T, H] and weight [V, H] (under autocast both are cast to its dtype); labels [T] integers in [0, V) or
    `ignore_index`: hidden[i] is scored against labels[i] (no shift), and ignored tokens cost nothing. softcap c
    replaces a logit x by c * tanh(x / c); z_loss adds z_loss * logsumexp(logits)^2 to each token's loss (PaLM,
    arXiv:2204.02311). reduction: "mean" over valid tokens (NaN when there is none), "sum", or "none" for [T] with 0
    where ignored. The loss is float32 (float64 for float64 input). First derivatives only. A label outside [0, V)
    raises RuntimeError on the CPU and gives NaN on a GPU. Raises ValueError when shapes or dtypes do not match or the
    reduction is unknown.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [T, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"expected labels [{hidden.shape[0]}], got {list(labels.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias [{weight.shape[0]}], got {list(bias.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them")
    labels = labels.long()
    with torch.autocast(kind, enabled=False):
        if reduction == "none":
            return _per_token(hidden, weight, labels, bias, softcap, z_loss, ignore_index)
        inputs = (hidden, weight, bias)
        need = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]
        loss = _summed(hidden, weight, labels, bias, softcap, z_loss, ignore_index, *need)[0]
        return loss / (labels != ignore_index).sum() if reduction == "mean" else loss
