"""Runs inside a job: packed documents under ZeRO in models that run modules document by document, against plain torch.

Usage: isolation_worker.py RESULTS.json
"""

import json
import sys
from pathlib import Path

from ds_llm import cli

cli.quiet()
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from architectures import tiny  # noqa: E402

from ds_llm.config import run as configuration  # noqa: E402
from ds_llm.engine import engine as engines  # noqa: E402
from ds_llm.engine import processes  # noqa: E402
from ds_llm.models.head import attach_loss_head  # noqa: E402
from ds_llm.models.isolation import isolate  # noqa: E402
from ds_llm.train.modes.sft import SupervisedLoss  # noqa: E402

ARCHITECTURES = ("qwen3_next", "jamba", "gpt_oss", "falcon")
LENGTHS = ((3, 4, 5, 1, 6, 5), (24,))  # rank 0 has six documents of several lengths, rank 1 one
STEPS, LR = 3, 3e-3


def model(name: str):
    torch.manual_seed(0)
    return attach_loss_head(tiny(name)).train()


def documents() -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(2, 64, (n,), generator=generator) for n in lengths] for lengths in LENGTHS]


def reference(name: str) -> tuple[list[float], dict]:
    """Losses and weights of plain torch, each document alone."""
    plain = model(name)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        found = [ids for row in documents() for ids in row if len(ids) > 1]
        count = sum(len(ids) - 1 for ids in found)
        loss = sum(
            torch.nn.functional.cross_entropy(
                plain(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="sum"
            )
            for ids in found
        )
        (loss / count).backward()
        losses.append(loss.item() / count)
        optimizer.step()
    return losses, dict(plain.named_parameters())


def run(name: str, stage: int, expected: tuple) -> dict:
    keys = [f"zero={stage}", "train.dtype=fp32", "train.batch_size=1", "optim.grad_clip=0", f"optim.lr={LR}"]
    config = configuration.load(None, [*keys, "optim.weight_decay=0"])
    trained = model(name)
    isolate(trained)
    if name == "jamba":
        trained.gradient_checkpointing_enable({"use_reentrant": False})
    engine = engines.Engine(SupervisedLoss(trained), config)
    engine.train()
    row = documents()[dist.get_rank()]
    shifted = [torch.cat([ids[1:], torch.tensor([-100])]) for ids in row]
    batch = {"input_ids": torch.cat(row)[None], "labels": torch.cat(shifted)[None]}
    batch["position_ids"] = torch.cat([torch.arange(len(ids)) for ids in row])[None]
    count = sum(len(ids) - 1 for lengths in documents() for ids in lengths)
    losses = []
    for _ in range(STEPS):
        engine.begin_micro_step(last=True)
        found = engine.forward(**batch)
        engine.backward(found.loss_sum / count)
        losses += engine.total([found.loss_sum.item() / count])
        engine.step(LR)
    state = engine.gather(trained)
    engine.destroy()
    if dist.get_rank():
        return {}
    start = dict(model(name).named_parameters())
    pairs = [(state[n], w.detach(), start[n].detach()) for n, w in expected[1].items() if n in state]
    # Adam makes whole steps of gradients that are rounding alone, so not every element can be alike
    wrong = sum((found - weight).square().sum() for found, weight, _ in pairs)
    return {
        "loss_error": max(abs(a / b - 1) for a, b in zip(losses, expected[0], strict=True)),
        "weight_error": float(wrong / sum((weight - before).square().sum() for _, weight, before in pairs)) ** 0.5,
    }


def main() -> None:
    processes.init_distributed()
    found = {}
    for name in ARCHITECTURES:
        expected = reference(name)
        for stage in (1, 2, 3):
            found[f"{name}-{stage}"] = run(name, stage, expected)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
