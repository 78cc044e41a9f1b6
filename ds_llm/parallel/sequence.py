"""Sequence parallelism (DeepSpeed Ulysses: Jacobs et al. 2023, arXiv:2309.14509): ranks share the tokens of a row.

All layers but attention work token by token, so each rank computes on its part of a row. Attention needs the whole row:
before it, ranks exchange heads for tokens, so that each has all tokens of its share of the heads; after it, they
exchange back. DeepSpeed's own version has only a causal mask. This one also keeps packed documents apart, with any
attention kernel, and allocates nothing of size tokens x tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ds_llm.compat.transformers import ALL_ATTENTION_FUNCTIONS, is_flash_attn_2_available
from ds_llm.errors import UserError
from ds_llm.models.attention import document_attention
from ds_llm.models.documents import Documents
from ds_llm.models.head import IGNORE_INDEX
from ds_llm.parallel.layout import Exchange, Total

NAME = "ds_llm_sequence"
# Families in which attention alone mixes tokens, and which hand `shard` on to it. `tests/multirank/test_rows.py`
# compares each with unshared rows.
MODEL_TYPES = (
    "ds_llm_decoder",
    *("afmoe", "apertus", "arcee", "biogpt", "bitnet", "cohere", "cohere2", "ctrl", "cwm", "deepseek_v2"),
    *("deepseek_v3", "diffllama", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "gemma"),
    *("gemma2", "gemma3_text", "gemma3n_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox"),
    *("gpt_oss", "granite", "granitemoe", "granitemoeshared", "hunyuan_v1_dense", "hunyuan_v1_moe", "jetmoe", "llama"),
    *("minimax_m2", "ministral", "mistral", "mixtral", "nanochat", "olmo", "olmo2", "olmo3", "olmoe", "opt"),
    *("persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3"),
    *("starcoder2", "vaultgemma"),
)


@dataclass
class Shard:
    """A rank's part of its rows. position_ids [B, S]: of the whole rows, on the model's device.

    kernel: the name of the attention function for whole rows.
    """

    group: dist.ProcessGroup
    position_ids: Tensor
    kernel: str

    def __post_init__(self):
        self.size = dist.get_world_size(self.group)
        self._documents = None

    def total(self, value: Tensor) -> Tensor:
        """The sum over the ranks of a row, for a loss that each of these ranks computes."""
        return Total.apply(value, self.group)

    def gather(self, value: Tensor) -> Tensor:
        """The values of all ranks of a row, concatenated along dimension 0, for a loss that each of them computes."""
        parts = [value if i == dist.get_rank(self.group) else torch.zeros_like(value) for i in range(self.size)]
        return self.total(torch.cat(parts))

    @property
    def documents(self) -> Documents:
        """Where the documents of the whole rows lie."""
        if self._documents is None:
            found = Documents.of(self.position_ids)
            self._documents = found or Documents.whole_rows(self.position_ids)
        return self._documents


def split(batch: dict[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """Part `rank` of `size` of a micro-batch, with its labels (shifted already) and masks.

    Rows are padded to a multiple of `size`. `position_ids` [B, S / size] are positions in the whole row;
    `row_positions` [B, S] are those of all its tokens. An attention mask becomes a `token_mask`: padding is on the
    right, where causal attention does not see it.
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
    """Attention over whole rows, with the signature of transformers' attention functions.

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
    if kwargs.get("s_aux") is not None:  # a sink for each head
        kwargs["s_aux"] = kwargs["s_aux"].view(size, -1)[dist.get_rank(shard.group)]
    if "flash" in shard.kernel:
        attend = ALL_ATTENTION_FUNCTIONS[shard.kernel]
        out, _ = attend(module, query, key, value, None, **shard.documents.arguments(), **kwargs)
    else:
        one = (x.transpose(0, 1).reshape(1, x.shape[1], rows * length, -1) for x in (query, key, value))
        out, _ = document_attention(module, *one, shard.documents.bounds, **kwargs)
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
    return parts.permute(1, 2, 0, 3, 4).reshape(rows, length // size, size * heads, width).contiguous()


def check(architecture, size: int) -> None:
    """Raise `UserError` where a model with this transformers configuration cannot compute on parts of rows."""
    config = architecture.get_text_config()
    if config.model_type not in MODEL_TYPES:
        raise UserError(
            f"parallel.sequence: not known to be right for '{config.model_type}' models; docs/models.md names those "
            "that can share rows"
        )
    sinks, capped = config.model_type == "gpt_oss", getattr(config, "attn_logit_softcapping", None)
    if torch.cuda.is_available() and (sinks or (capped and not is_flash_attn_2_available())):
        raise UserError(
            f"parallel.sequence: no attention of this machine's GPUs has the {'sinks' if sinks else 'soft caps'} of "
            f"'{config.model_type}' models over shared rows; set parallel.sequence=1"
            + ("" if sinks else ", or install flash-attn")
        )
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    if heads % size:
        raise UserError(f"parallel.sequence: {size} does not divide the model's {heads} attention heads")
    if shared % size and size % shared:
        raise UserError(f"parallel.sequence: {size} and the model's {shared} key/value heads do not divide each other")


AttentionInterface.register(NAME, attention)
