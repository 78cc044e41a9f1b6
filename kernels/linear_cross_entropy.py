"""Cross-entropy of a linear head, straight from hidden states: the logits exist one chunk of tokens at a time.

With reduction "sum" or "mean" the gradients are formed in the forward pass while a chunk's logits are at hand (as in
Liger-Kernel's fused linear cross-entropy, arXiv:2410.10989): three matrix products in all, nothing but the gradients
is saved, and the weight is not touched in backward, so a ZeRO-3 shard is gathered once. With "none" the upstream
gradient of each token is not known yet, so backward recomputes the logits (four products).
"""

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
ROW_BLOCK = 16  # rows handled at a time on the CPU: their float32 logits stay in the cache
FP16_SCALE = 4096.0  # keeps probabilities below fp16's smallest number (6e-8) alive through the matrix products


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"])
    return max(128, budget // (weight.shape[0] * hidden.element_size()) // 128 * 128)


def _rows_reference(
    logits: Tensor,
    labels: Tensor,
    softcap: float | None,
    z_loss: float,
    upstream: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Loss [T] of `logits` [T, V]; with `scale`, they are overwritten by scale * upstream * dloss/dlogits."""
    acc = _accumulate_dtype(logits.dtype)
    losses = torch.empty(logits.shape[0], dtype=acc, device=logits.device)
    for i in range(0, logits.shape[0], ROW_BLOCK):
        block = logits[i : i + ROW_BLOCK]
        x, column = block.to(acc), labels[i : i + ROW_BLOCK, None]
        if softcap is not None:
            x = torch.tanh(x / softcap).mul_(softcap)
        cap = x.clone() if softcap is not None and scale is not None else None
        label_logit = x.gather(1, column).squeeze(1)
        m = x.amax(1)
        x = x.sub_(m[:, None]).exp_()
        s = x.sum(1)
        lse = m + s.log()
        losses[i : i + ROW_BLOCK] = lse - label_logit + z_loss * lse.square()
        if scale is None:
            continue
        up = scale if upstream is None else scale * upstream[i : i + ROW_BLOCK]
        x.mul_((up * (1 + 2 * z_loss * lse) / s)[:, None])
        x.scatter_add_(1, column, torch.full_like(label_logit, -1.0).mul_(up)[:, None])
        if cap is not None:
            x.mul_(1 - (cap / softcap).square())
        if x.data_ptr() != block.data_ptr():
            block.copy_(x)
    return losses


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
    dtype, acc = hidden.dtype, _accumulate_dtype(hidden.dtype)
    saved = acc if dtype == torch.float16 else dtype
    rows = min(_chunk_rows(hidden, weight), max(T, 1))
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
        if bias is not None:
            logits += bias
        losses[part] = _rows_reference(
            logits, labels[part], softcap, z_loss, None if upstream is None else upstream[part], scale
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


def _compute(hidden, weight, labels, bias, softcap, z_loss, ignore_index, upstream, need):
    """`_chunks` over the rows that have a label: ignored tokens cost no product. Their loss and gradient are 0."""
    keep = (labels != ignore_index).nonzero().squeeze(1)
    if keep.numel() == labels.numel():
        return _chunks(hidden, weight, labels, bias, softcap, z_loss, upstream, need)
    part = _chunks(
        hidden[keep], weight, labels[keep], bias, softcap, z_loss, None if upstream is None else upstream[keep], need
    )
    losses = part[0].new_zeros(labels.shape).index_copy_(0, keep, part[0])
    grad_hidden = None if part[1] is None else part[1].new_zeros(hidden.shape).index_copy_(0, keep, part[1])
    return losses, grad_hidden, part[2], part[3]


class _SumLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, softcap, z_loss, ignore_index, grad_mode):
        need = tuple(grad_mode and ctx.needs_input_grad[i] for i in (0, 1, 3))
        losses, *grads = _compute(hidden, weight, labels, bias, softcap, z_loss, ignore_index, None, need)
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(*grads)
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        gh, gw, gb = (None if g is None else (g * upstream).to(ctx.dtype) for g in ctx.saved_tensors)
        return gh, gw, None, gb, None, None, None, None


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, softcap, z_loss, ignore_index):
        ctx.save_for_backward(hidden, weight, labels, bias)
        ctx.options = (softcap, z_loss, ignore_index)
        return _compute(hidden, weight, labels, bias, softcap, z_loss, ignore_index, None, (False, False, False))[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        hidden, weight, labels, bias = ctx.saved_tensors
        need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        _, *grads = _compute(hidden, weight, labels, bias, *ctx.options, upstream, need)
        gh, gw, gb = (None if g is None else g.to(hidden.dtype) for g in grads)
        return gh, gw, None, gb, None, None, None


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
    where ignored. The loss is float32 (float64 for float64 input). First derivatives only. Raises ValueError when
    shapes do not match or the reduction is unknown.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [T, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"expected labels [{hidden.shape[0]}], got {list(labels.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    labels = labels.long()
    with torch.autocast(kind, enabled=False):
        if reduction == "none":
            return _TokenLoss.apply(hidden, weight, labels, bias, softcap, z_loss, ignore_index)
        loss = _SumLoss.apply(hidden, weight, labels, bias, softcap, z_loss, ignore_index, torch.is_grad_enabled())
        return loss / (labels != ignore_index).sum() if reduction == "mean" else loss
