"""Checks inside a job of two processes: training under ZeRO, and with shared experts or rows, against plain torch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ds_llm.config import run as configuration
from ds_llm.engine.engine import Engine
from ds_llm.engine.processes import init_distributed
from ds_llm.models.documents import Way
from ds_llm.parallel import compatibility, parallelize
from ds_llm.train.modes.sft import SupervisedLoss
from ds_llm.verify.checks import for_training, way_of
from ds_llm.verify.processes import CASES, PROCESSES
from ds_llm.verify.report import Finding, prove
from ds_llm.verify.samples import batch_of, documents, number, plain_loss, trained, vocabulary
from ds_llm.verify.subject import Subject

STEPS, LR, EPSILON = 3, 3e-3, 1e-3  # a large epsilon: Adam otherwise makes whole steps of rounding
LOSS, WEIGHTS = 1e-4, 1e-2  # what rounding may change: of the loss, and of how far the weights moved


def main(subject: Subject, rows: Path) -> None:
    """Run the checks on a subject, a line in the file `rows` for each."""
    init_distributed()
    way = way_of(subject)
    data = documents(vocabulary(subject.model()), packed=way is not None)
    expected = reference(subject, data) if dist.get_rank() == 0 else None
    for name, keys in CASES.items():

        def check(keys=keys) -> Finding:
            return train(subject, way, data, keys, expected)

        row = prove(name, check)
        if dist.get_rank() == 0:
            with open(rows, "a", encoding="utf-8") as file:
                file.write(json.dumps(row.to_dict()) + "\n")


def reference(subject: Subject, data: list[list[Tensor]]) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses of the steps, weights after and before them, of plain torch with each document alone."""
    model = subject.model().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=EPSILON, weight_decay=0.0)
    found = trained(data)
    count = sum(len(ids) - 1 for ids in found)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = plain_loss(model, found) / count
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, {name: p.detach() for name, p in model.named_parameters()}, before


def train(subject: Subject, way: Way | None, data: list[list[Tensor]], keys: tuple, expected: tuple | None) -> Finding:
    """Train as a run does, with rank r on row r or with both on parts of both rows; rank 0 compares. Collective."""
    plain = ["train.dtype=fp32", "optim.grad_clip=0", f"optim.lr={LR}", f"optim.eps={EPSILON}", "optim.weight_decay=0"]
    # DeepSpeed leaves small weights whole under ZeRO-3, and all of these are small
    shard_all = "deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
    config = configuration.load(None, [*plain, "optim.betas=[0.9, 0.95]", shard_all, *keys])
    compatibility.check(config, PROCESSES)
    for architecture in (subject.config, subject.small):
        parallelize.check_architecture(architecture, config.parallel)
    model = for_training(subject, way)
    batch = batch_of(data)
    config.train.batch_size = len(data) * config.parallel.sequence // PROCESSES
    engine = Engine(SupervisedLoss(model), config)
    try:
        losses = _steps(engine, batch, config.train.batch_size)
        state = engine.gather(model)
    finally:
        engine.destroy()
    return Finding() if expected is None else _compare(losses, state, *expected)


def _steps(engine: Engine, batch: dict[str, Tensor], size: int) -> list[float]:
    count, first = int((batch["labels"] >= 0).sum()), engine.layout.batch * size
    engine.train()
    losses = []
    for _ in range(STEPS):
        engine.begin_micro_step(last=True)
        found = engine.forward(**engine.part({name: value[first : first + size] for name, value in batch.items()}))
        engine.backward(found.loss_sum / count)
        losses += engine.total([found.loss_sum.item() / count])
        engine.step(LR)
    return losses


def _compare(
    losses: list[float], state: dict[str, Tensor], expected: list[float], after: dict, before: dict
) -> Finding:
    wrong = max(number(abs(a / b - 1)) for a, b in zip(losses, expected, strict=True))
    if wrong > LOSS:
        return Finding("the loss", wrong, LOSS)
    if missing := sorted(after.keys() - state.keys()):
        return Finding(f"{missing[0]} is not among the gathered weights", math.inf, WEIGHTS)
    apart = sum((state[name] - value).double().square().sum() for name, value in after.items())
    moved = sum((value - before[name]).double().square().sum() for name, value in after.items())
    about = f"losses and weights after {STEPS} steps"
    return Finding(about, float((apart / moved).sqrt()), WEIGHTS)
