"""Python objects and errors shared by all ranks."""

from __future__ import annotations

import torch.distributed as dist

from ds_llm.errors import UserError


def gather(value) -> list:
    """The values of all ranks, in their order, on every rank. Collective; values are pickled."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_all(error: str | None) -> None:
    """Raise `UserError` on every rank with the message of the first rank that has one. Collective."""
    for message in gather(error):
        if message:
            raise UserError(message)
