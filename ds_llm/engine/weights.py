"""Puts a model's weights where DeepSpeed computes with them, without a whole model on any rank under ZeRO-3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_llm.compat.deepspeed import Partitioner
from ds_llm.engine.processes import device
from ds_llm.models.deferred import in_place_of, read, replace, settle
from ds_llm.parallel.experts import ExpertShare


def place(module: nn.Module, settings: dict) -> None:
    """Give this rank its part of a module's weights under ZeRO-3, else all of them, in place. Collective.

    settings: DeepSpeed's JSON. Deferred weights (`ds_llm.models.deferred`) are read here, one at a time. All get the
    dtype of training, to which DeepSpeed would cast them.
    """
    dtype = torch.bfloat16 if _on(settings, "bf16") else torch.float16 if _on(settings, "fp16") else None
    packed = any(not p.is_floating_point() for p in module.parameters())
    if settings["zero_optimization"]["stage"] < 3 or packed:
        settle(module, device(), dtype)
        return
    for share in module.modules():
        if isinstance(share, ExpertShare):
            share.set_deepspeed_parallelism()  # makes the groups of ranks that hold the same experts
    partitioner, here = Partitioner(settings), device()

    def own_part(old: Tensor) -> Tensor:
        if not isinstance(old, nn.Parameter):
            return in_place_of(old, old.to(here))
        # memory of the whole weight, of which the system provides no more than is written
        weight = in_place_of(old, torch.empty(old.shape, dtype=dtype or old.dtype))
        partitioner.partition(weight, lambda start, end, out: read(old, start, end, out), here)
        return weight

    replace(module, own_part)


def _on(settings: dict, name: str) -> bool:
    return settings.get(name, {}).get("enabled", False)
