"""Perplexity of a token stream by the protocol of the published pruning and quantisation results.

The protocol is that of GPTQ (Frantar et al. 2022, arXiv:2210.17323), SparseGPT and Wanda: the texts are joined by two
newlines and tokenised once with the tokenizer's own special tokens (so a beginning-of-text token, where the tokenizer
adds one, stands once at the very start); the stream is cut into non-overlapping windows, the tail shorter than a window
is dropped; each window's loss is the mean over its token_length - 1 predicted tokens; the perplexity is exp of the mean
of the windows' losses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ds_llm.errors import UserError
from ds_llm.models.backbone import backbone
from ds_llm.models.head import IGNORE_INDEX, head_loss
from ds_llm.parallel.layout import Layout
from ds_llm.progress import progress

RowLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Perplexity:
    """`value` is exp(nll), `nll` the mean negative log-likelihood in nats per predicted token."""

    value: float
    nll: float
    windows: int
    tokens: int  # predicted tokens that count
    stream_tokens: int
    dropped_tokens: int  # in the tails of the streams, or past `max_windows`
    token_length: int
    stride: int
    seconds: float
    streams: tuple[float, ...] = ()  # nll of each stream, NaN where none of its windows was used

    def to_dict(self) -> dict:
        return asdict(self)


def model_loss(model: torch.nn.Module, device: torch.device | str) -> RowLoss:
    """Row losses of a causal language model prepared by `ds_llm.models.head.attach_loss_head`, in evaluation mode.

    The function takes `input_ids` [B, L] and shifted `labels` [B, L] on the CPU and gives the summed loss of each row
    [B], float32. Logits exist for a chunk of one row at a time.
    """
    body, head = backbone(model), model.get_output_embeddings()

    def loss(input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = body(input_ids=input_ids.to(device), use_cache=False).last_hidden_state
        return torch.stack([head_loss(head, h, y) for h, y in zip(hidden, labels.to(device), strict=True)])

    return loss


def check_length(streams: Sequence[np.ndarray | Tensor], token_length: int) -> None:
    """Raise `UserError` where no stream holds a whole window."""
    longest = max(map(len, streams), default=0)
    if longest < token_length:
        raise UserError(
            f"the text has {longest:,} tokens, less than one window of {token_length:,}: "
            "give more text or a shorter token length"
        )


@torch.no_grad()
def perplexity_of_tokens(
    loss_fn: RowLoss,
    tokens: np.ndarray | Tensor | Sequence[np.ndarray],
    *,
    token_length: int,
    stride: int | None = None,
    batch_size: int = 1,
    max_windows: int = 0,
    title: str = "perplexity",
    share: Layout | None = None,
) -> Perplexity:
    """Perplexity of one token stream [n], or of several whose windows never cross from one into the next.

    loss_fn: `input_ids` [B, token_length] int64, `labels` [B, token_length] (already shifted, -100: does not count),
        both on the CPU -> sum of the negative log-likelihoods of each row [B] in nats. See `model_loss`.
    stride: distance of the windows' starts, `token_length` if None. A smaller one gives tokens more context: all
        token_length - 1 tokens of a stream's first window count and of each later one only its last `stride`, those no
        earlier window has predicted; the loss is then the sum over all counted tokens divided by their number. At
        stride = token_length all windows count equally many tokens, so this is the mean of the windows' means.
    batch_size: windows per forward pass and rank, at most.
    max_windows: use only so many windows, from the front; 0: all.

    share: which ranks run the same model together and so must see the same windows; None: none.

    In a process group the batches are dealt to the ranks. Their contents do not depend on the number of ranks and the
    losses are added in the order of the windows with `math.fsum`, so every world size gives the same bits as long as
    `loss_fn` does; every rank calls it equally often with equal shapes, so a ZeRO-3 model does not hang. All ranks
    return the same result. Raises `UserError` for a stream without a whole window or an impossible window.
    """
    start = time.perf_counter()
    stride = token_length if stride is None else stride
    check_windows(token_length, stride, batch_size, max_windows)
    streams = list(tokens) if isinstance(tokens, (list, tuple)) else [tokens]
    check_length(streams, token_length)
    lengths = [len(stream) for stream in streams]
    windows = [
        (which, first) for which, length in enumerate(lengths) for first in range(0, length - token_length + 1, stride)
    ]
    windows = windows[:max_windows] if max_windows else windows
    sums = _window_sums(loss_fn, streams, windows, token_length, stride, batch_size, title, share)
    counted = [_counted(first, token_length, stride) for _, first in windows]
    used = {which: first + token_length for which, first in windows}  # the last window of each stream ends there
    nll = math.fsum(sums) / sum(counted)
    return Perplexity(
        value=math.exp(nll) if nll < 700 else math.inf if nll > 0 else math.nan,
        nll=nll,
        windows=len(windows),
        tokens=sum(counted),
        stream_tokens=sum(lengths),
        dropped_tokens=sum(lengths) - sum(used.values()),
        token_length=token_length,
        stride=stride,
        seconds=time.perf_counter() - start,
        streams=tuple(_stream_nll(which, windows, sums, counted) for which in range(len(streams))),
    )


def _stream_nll(which: int, windows: list[tuple[int, int]], sums: Sequence[float], counted: list[int]) -> float:
    mine = [number for number, (stream, _) in enumerate(windows) if stream == which]
    tokens = sum(counted[number] for number in mine)
    return math.fsum(sums[number] for number in mine) / tokens if tokens else math.nan


def check_windows(token_length: int, stride: int, batch_size: int, max_windows: int) -> None:
    """Raise `UserError` for impossible arguments of `perplexity_of_tokens`."""
    if token_length < 2:
        raise UserError(f"token length {token_length}: a window needs 2 tokens or more")
    if not 1 <= stride <= token_length:
        raise UserError(f"stride {stride}: must be between 1 and the token length, {token_length}")
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: must be at least 1")
    if max_windows < 0:
        raise UserError(f"max windows {max_windows}: must be at least 1, or 0 for all")


def _counted(first: int, token_length: int, stride: int) -> int:
    return min(stride, token_length - 1) if first else token_length - 1


def _window_sums(loss_fn, streams, windows, token_length, stride, batch_size, title, share) -> list[float]:
    """Summed loss of every window, on all ranks."""
    if share is None:
        share = Layout(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Layout(0, 1)
    rank, world = share.replica, share.replicas
    batches = math.ceil(len(windows) / batch_size)
    rows = math.ceil(len(windows) / batches)  # evened out: fewer rows to fill up the last batch with
    rounds = math.ceil(batches / world)
    sums = torch.zeros(len(windows), dtype=torch.float64)
    with progress(title, total=len(windows), unit="windows") as task:
        for turn in range(rounds):
            batch = turn * world + rank
            mine = range(batch * rows, min((batch + 1) * rows, len(windows)))
            # a rank without a batch, and the rows missing in the last one, repeat the last window: equal shapes
            # everywhere
            chosen = [windows[i] for i in mine]
            chosen += [windows[-1]] * (rows - len(chosen))
            found = loss_fn(*_batch(streams, chosen, token_length, stride))
            if found.shape != (rows,):
                raise ValueError(f"loss_fn returned {list(found.shape)} for {rows} rows; expected one sum per row")
            if share.counts:
                sums[mine.start : mine.stop] = found[: len(mine)].double().cpu()
            done = min((turn + 1) * world * rows, len(windows)) - min(turn * world * rows, len(windows))
            task.advance(done)
    if share.world > 1:
        # one rank has the value of a window and the others 0, so the sum is exact
        place = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        sums = sums.to(place)
        dist.all_reduce(sums)
    return sums.tolist()


def _batch(streams, chosen: list[tuple[int, int]], token_length: int, stride: int) -> tuple[Tensor, Tensor]:
    cut = [np.asarray(streams[which][first : first + token_length]).astype(np.int64) for which, first in chosen]
    input_ids = torch.from_numpy(np.stack(cut))
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[:, :-1] = input_ids[:, 1:]
    for row, (_, first) in enumerate(chosen):
        labels[row, : token_length - 1 - _counted(first, token_length, stride)] = IGNORE_INDEX
    return input_ids, labels
