"""Forward passes of a frozen model, sharded under ZeRO-3."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from ds_llm.config.deepspeed import build as build_deepspeed_config
from ds_llm.config.run import Config
from ds_llm.engine.moe_blocks import keep_blocks_whole
from ds_llm.engine.processes import device
from ds_llm.engine.weights import place
from ds_llm.models.parameters import exact_buffers, restore_buffers


@contextlib.contextmanager
def inference(module: nn.Module, config: Config) -> Iterator[Callable]:
    """Yield the forward pass of a frozen module in `train.dtype`, without gradients.

    Under ZeRO-3 the ranks hold shards of the weights and must all call it equally often; otherwise every rank holds all
    weights. Do not use the module after the block.
    """
    module.requires_grad_(False).eval()
    settings = build_deepspeed_config(config, dist.get_world_size())
    if settings["zero_optimization"]["stage"] < 3:
        place(module, settings)
        module.to(device())
        run, release = module, lambda: None
    else:
        keep_blocks_whole(module)
        exact = exact_buffers(module)
        zero = {k: v for k, v in settings["zero_optimization"].items() if k != "offload_optimizer"}
        names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16", "fp16", "steps_per_print")
        chosen = {name: settings[name] for name in names if name in settings} | {"zero_optimization": zero}
        place(module, chosen)
        run, *_ = deepspeed.initialize(model=module, config=chosen)
        restore_buffers(module, exact, device())
        run.eval()
        release = run.destroy

    @torch.no_grad()
    def forward(**batch):
        return run(**{k: v.to(device()) if torch.is_tensor(v) else v for k, v in batch.items()})

    try:
        yield forward
    finally:
        release()
