"""Puts a model's weights where DeepSpeed computes with them, without a whole model on any rank under ZeRO-3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_llm.compat.deepspeed import Partitioner
from ds_llm.engine.processes import device
from ds_llm.models.deferred import Deferred, in_place_of, read, replace, settled_values
from ds_llm.parallel.experts import ExpertShare
from ds_llm.progress import progress


def place(module: nn.Module, settings: dict) -> None:
    """Give this rank its part of a module's weights under ZeRO-3, else all of them, in place. Collective.

    settings: DeepSpeed's JSON. Deferred weights (`ds_llm.models.deferred`) are read here, one at a time. All get the
    dtype of training, to which DeepSpeed would cast them.
    """
    dtype = torch.bfloat16 if _on(settings, "bf16") else torch.float16 if _on(settings, "fp16") else None
    packed = any(not p.is_floating_point() for p in module.parameters())
    here = device()
    if sharded := settings["zero_optimization"]["stage"] == 3 and not packed:
        for share in module.modules():
            if isinstance(share, ExpertShare):
                share.set_deepspeed_parallelism()  # makes the groups of ranks that hold the same experts
        partitioner = Partitioner(settings)

    def placed(old: Tensor) -> Tensor:
        task.advance(old.numel() * old.element_size() / 1e9)
        if not sharded:
            return in_place_of(old, settled_values(old, here, dtype)) if isinstance(old, Deferred) else old
        if not isinstance(old, nn.Parameter):
            return in_place_of(old, old.to(here))
        # memory of the whole weight, of which the system provides no more than is written
        weight = in_place_of(old, torch.empty(old.shape, dtype=dtype or old.dtype))
        partitioner.partition(weight, lambda start, end, out: read(old, start, end, out), here)
        return weight

    tensors = [*module.parameters(), *module.buffers()]
    with progress("reading weights", sum(t.numel() * t.element_size() for t in tensors) / 1e9, "GB") as task:
        replace(module, placed)


def _on(settings: dict, name: str) -> bool:
    return settings.get(name, {}).get("enabled", False)
