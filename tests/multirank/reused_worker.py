"""Runs inside a job: gradients of a module that is used several times in a step, per ZeRO stage, against plain torch.

Usage: reused_worker.py RESULTS.json
"""

import json
import sys
from pathlib import Path

from ds_llm import cli

cli.quiet()
import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from ds_llm.config import run as configuration  # noqa: E402
from ds_llm.engine import engine as engines  # noqa: E402
from ds_llm.engine import processes  # noqa: E402

WIDTH, ROWS, MICRO_STEPS = 24, 4, 2
SETTINGS = ("contiguous_gradients=false", "overlap_comm=true", "reduce_scatter=false", "reduce_bucket_size=100")


class Reused(nn.Module):
    """`shared` is called three times in a forward pass, `last` once, and its weight a second time by hand.

    recomputed: the calls of `shared` are run again in the backward pass, as activation checkpointing does.
    """

    def __init__(self, recomputed: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.last, self.recomputed = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), recomputed

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.shared(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = checkpoint(self.step, x, use_reentrant=False) if self.recomputed else self.step(x)
        x = self.last(x)
        return (nn.functional.linear(x, self.last.weight).float() ** 2).sum() / WIDTH


def inputs() -> torch.Tensor:
    """[rank, micro-step, ROWS, WIDTH], different for every rank."""
    return torch.randn(dist.get_world_size(), MICRO_STEPS, ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def reference() -> dict[str, torch.Tensor]:
    """Gradients of the sum over all ranks and micro-steps, in float64."""
    model = Reused().double()
    sum(model(x.double()) for x in inputs().flatten(0, 1)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def gradients(dtype: str, stage: int, setting: str) -> dict[str, torch.Tensor]:
    keys = [f"zero={stage}", f"train.dtype={dtype}", f"train.batch_size={ROWS}", "optim.grad_clip=0"]
    keys += [f"deepspeed.zero_optimization.{setting}"] * (setting in SETTINGS)
    model = Reused(setting == "recomputed")
    engine = engines.Engine(model, configuration.load(None, [*keys, f"train.accumulation_steps={MICRO_STEPS}"]))
    low = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    for step, x in enumerate(inputs()[dist.get_rank()]):
        engine.begin_micro_step(last=step == MICRO_STEPS - 1)
        engine.backward(engine.forward(x=x.to(low)))
    found = {name: deepspeed.utils.safe_get_full_grad(p).double().clone() for name, p in model.named_parameters()}
    engine.destroy()
    return found


def main() -> None:
    processes.init_distributed()
    expected, found = reference(), {}
    for dtype in ("fp32", "bf16"):
        for stage in (1, 2, 3):
            for setting in ("plain", "recomputed", *SETTINGS):
                made = gradients(dtype, stage, setting).items()
                error = max(((g - expected[n]).norm() / expected[n].norm()).item() for n, g in made)
                found[f"{dtype}-{stage}-{setting}"] = error
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
