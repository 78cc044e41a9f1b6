"""Training samples as batches, and how many tokens of a batch count."""

from __future__ import annotations

from typing import Protocol

import torch


class Samples(Protocol):
    """Training samples: `len()` and `batch(indices)`, tensors [B, S] of which `labels` are -100 where nothing is
    learned."""

    def __len__(self) -> int: ...

    def batch(self, indices) -> dict[str, torch.Tensor]: ...


def count_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens of a micro-batch that carry loss."""
    return int((batch["labels"] != -100).sum())


def count_processed(batch: dict[str, torch.Tensor]) -> int:
    """Tokens of a micro-batch without padding, with or without loss."""
    mask = batch.get("attention_mask", batch.get("token_mask"))
    return batch["labels"].numel() if mask is None else int(mask.sum())
