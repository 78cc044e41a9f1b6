"""Sequence parallelism (DeepSpeed Ulysses: Jacobs et al. 2023, arXiv:2309.14509): a row's tokens are spread over ranks.

Everything but attention works token by token, so each rank computes on its part of a row alone. Attention sees the
whole row: before it heads are exchanged for tokens, so that every rank has all tokens of its share of the heads, and
back after it. DeepSpeed's own version knows rows by a causal mask only; here packed documents stay apart, on any
attention kernel, and nothing has the size of tokens x tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ds_llm.compat.transformers import ALL_ATTENTION_FUNCTIONS
from ds_llm.errors import UserError
from ds_llm.models.attention import MODEL_TYPES, document_attention
from ds_llm.models.head import IGNORE_INDEX, document_lengths
from ds_llm.parallel.layout import Exchange, Total

NAME = "ds_llm_sequence"


@dataclass
class Shard:
    """Which part of its rows a rank works on. position_ids [B, S]: of the whole rows, on the model's device.

    kernel: the name of the attention function for whole rows.
    """

    group: dist.ProcessGroup
    position_ids: Tensor
    kernel: str

    def __post_init__(self):
        self.size = dist.get_world_size(self.group)
        self.documents = None

    def total(self, value: Tensor) -> Tensor:
        """The sum of what the ranks of the row have, for a loss that every one of them adds up."""
        return Total.apply(value, self.group)

    def gather(self, value: Tensor) -> Tensor:
        """What all ranks of the row have, along the first dimension, for a loss that every one of them adds up."""
        parts = [value if i == dist.get_rank(self.group) else torch.zeros_like(value) for i in range(self.size)]
        return self.total(torch.cat(parts))

    def bounds(self) -> dict:
        """Where the documents of the rows begin and end when the rows are laid in one, see `document_lengths`."""
        if self.documents is None:
            found = document_lengths(self.position_ids)
            if not found:
                rows, length = self.position_ids.shape
                ends = torch.arange(rows + 1, device=self.position_ids.device, dtype=torch.int32) * length
                found = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}
            self.documents = found
        return self.documents


def split(batch: dict[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """Part `rank` of `size` of a micro-batch, with its labels, which are shifted already, and its masks.

    Rows are filled up to a multiple of `size`. `position_ids` [B, S / size] are those of the whole row, and
    `row_positions` [B, S] all of them. An attention mask becomes a `token_mask`: padding stands on the right, where
    nothing sees it.
    """
    batch = dict(batch)
    rows, length = batch["input_ids"].shape
    if "position_ids" not in batch:
        batch["position_ids"] = torch.arange(length).expand(rows, -1)
    if "attention_mask" in batch:
        batch["token_mask"] = batch.pop("attention_mask").bool()
    if extra := -length % size:
        batch.setdefault("token_mask", torch.ones(rows, length, dtype=torch.bool))
        fill = {"labels": IGNORE_INDEX, "token_mask": False}
        batch = {name: F.pad(value, (0, extra), value=fill.get(name, 0)) for name, value in batch.items()}
        batch["position_ids"][:, length:] = torch.arange(extra)
    positions = batch["position_ids"].contiguous()
    part = slice(rank * (length + extra) // size, (rank + 1) * (length + extra) // size)
    return {name: value[:, part].contiguous() for name, value in batch.items()} | {"row_positions": positions}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shard: Shard | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention over whole rows, in the form of transformers' attention functions.

    query [B, heads, S / ranks, D], key and value [B, key heads, S / ranks, D] -> [B, S / ranks, heads, D].
    """
    if shard is None:
        raise ValueError("this attention needs the `shard` of its batch")
    size = shard.size
    if key.shape[1] % size:  # each key head serves several ranks
        key, value = (x.repeat_interleave(size // key.shape[1], dim=1) for x in (key, value))
    query, key, value = (_tokens_for_heads(x, shard) for x in (query, key, value))
    rows, heads, length = query.shape[:3]
    for name in ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        kwargs.pop(name, None)  # of this rank's part
    if "flash" in shard.kernel:
        attend = ALL_ATTENTION_FUNCTIONS[shard.kernel]
        out, _ = attend(module, query, key, value, None, **shard.bounds(), **kwargs)
    else:
        one = (x.transpose(0, 1).reshape(1, x.shape[1], rows * length, -1) for x in (query, key, value))
        out, _ = document_attention(module, *one, None, **shard.bounds(), **kwargs)
    return _heads_for_tokens(out.reshape(rows, length, heads, -1), shard), None


def _tokens_for_heads(x: Tensor, shard: Shard) -> Tensor:
    """[B, heads, S / ranks, D] of all heads -> [B, heads / ranks, S, D] of all tokens."""
    size = shard.size
    rows, heads, length, width = x.shape
    parts = x.view(rows, size, heads // size, length, width).transpose(0, 1)  # [rank, B, heads / ranks, S / ranks, D]
    parts = Exchange.apply(parts, [1] * size, [1] * size, shard.group)
    return parts.permute(1, 2, 0, 3, 4).reshape(rows, heads // size, size * length, width)


def _heads_for_tokens(x: Tensor, shard: Shard) -> Tensor:
    """[B, S, heads / ranks, D] -> [B, S / ranks, heads, D]."""
    size = shard.size
    rows, length, heads, width = x.shape
    parts = x.view(rows, size, length // size, heads, width).transpose(0, 1)
    parts = Exchange.apply(parts, [1] * size, [1] * size, shard.group)  # [rank, B, S / ranks, heads / ranks, D]
    return parts.permute(1, 2, 0, 3, 4).reshape(rows, length // size, size * heads, width)


def check(architecture, size: int) -> None:
    """Raise `UserError` where a model of this transformers configuration cannot work on parts of rows."""
    config = architecture.get_text_config()
    if config.model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise UserError(f"parallel.sequence: not known to be right for '{config.model_type}' models, only for {known}")
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    if heads % size:
        raise UserError(f"parallel.sequence: {size} does not divide the model's {heads} attention heads")
    if shared % size and size % shared:
        raise UserError(f"parallel.sequence: {size} and the model's {shared} key/value heads do not divide each other")


AttentionInterface.register(NAME, attention)
