"""Runs inside a job of two: rows shared between ranks against whole rows, in every family that can share them.

Usage: rows_worker.py RESULTS.json
"""

import json
import sys
from pathlib import Path

from ds_llm import cli

cli.quiet()
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from architectures import ARCHITECTURES, tiny  # noqa: E402

from ds_llm.config import run as configuration  # noqa: E402
from ds_llm.engine import processes  # noqa: E402
from ds_llm.models.head import attach_loss_head, lm_loss  # noqa: E402
from ds_llm.models.isolation import isolate  # noqa: E402
from ds_llm.parallel.parallelize import Division  # noqa: E402
from ds_llm.parallel.sequence import MODEL_TYPES  # noqa: E402
from ds_llm.train.modes.sft import SupervisedLoss  # noqa: E402

LENGTHS = ((3, 7, 5, 1, 6), (22,))  # of documents in two rows; one crosses the seam


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = [[torch.randint(2, 60, (n,), generator=generator) for n in lengths] for lengths in LENGTHS]
    shifted = [[torch.cat([ids[1:], torch.tensor([-100])]) for ids in row] for row in rows]
    positions = [[torch.arange(len(ids)) for ids in row] for row in rows]
    parts = {"input_ids": rows, "labels": shifted, "position_ids": positions}
    return {name: torch.stack([torch.cat(row) for row in value]) for name, value in parts.items()}


def case(name: str) -> dict[str, float]:
    """Relative differences of summed loss, auxiliary loss and gradients."""
    torch.manual_seed(0)
    model = attach_loss_head(tiny(name).train())
    isolate(model)
    whole = lm_loss(model, **batch())
    (whole.loss_sum + 10 * whole.aux_loss).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    config = configuration.load(None, ["parallel.sequence=2", "zero=0", "train.dtype=fp32"])
    objective = SupervisedLoss(model)
    division = Division(objective, config, {"zero_optimization": {"stage": 0}})
    division.train(True)
    shared = objective(**division.arguments(division.part(batch())))
    # the auxiliary loss of whole rows is on both ranks
    (shared.loss_sum + 10 * shared.aux_loss / 2).backward()
    losses = torch.stack([shared.loss_sum.detach(), shared.aux_loss.detach() / 2])
    dist.all_reduce(losses)
    largest, wrong = max(value.abs().max() for value in expected.values()), 0.0
    for n, p in model.named_parameters():
        found = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(found)
        other = expected.get(n, torch.zeros_like(p))
        wrong = max(wrong, float((found - other).abs().max() / other.abs().max().clamp_min(0.01 * largest)))
    return {
        "loss": abs(float(losses[0] / whole.loss_sum.detach()) - 1),
        "aux": abs(float(losses[1] - whole.aux_loss.detach())),
        "gradient": wrong,
    }


def main() -> None:
    processes.init_distributed()
    torch.set_num_threads(1)
    found = {name: case(name) for name in MODEL_TYPES if name in ARCHITECTURES}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
