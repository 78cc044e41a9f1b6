"""Learning-rate curves against their definitions and torch's schedulers."""

import itertools
import math
import random

import pytest
import torch

from ds_llm.config.sections import OptimConfig
from ds_llm.train.lr_schedule import learning_rate, warmup_steps


def curve(optim: OptimConfig, total: int) -> list[float]:
    return [learning_rate(optim, step, total) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "polynomial", "constant", "wsd"])
def test_shape(schedule):
    for _ in range(20):
        total = random.randint(20, 300)
        optim = OptimConfig(
            lr=random.uniform(1e-5, 1e-2),
            schedule=schedule,
            warmup_steps=random.randint(0, 10),
            min_lr_ratio=random.random(),
            power=random.uniform(0.5, 3),
            decay_ratio=random.random() * 0.5,
        )
        rates, warm = curve(optim, total), optim.warmup_steps
        assert max(rates) == pytest.approx(optim.lr)
        assert rates[:warm] == pytest.approx([optim.lr * (i + 1) / warm for i in range(warm)])
        after = rates[warm:]
        assert after == sorted(after, reverse=True)
        end = optim.lr if schedule == "constant" else optim.lr * optim.min_lr_ratio
        assert rates[-1] == pytest.approx(end)


def test_cosine_equals_torch():
    total, lr, low = 73, 3e-4, 0.1
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - 1, eta_min=low * lr)
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert curve(OptimConfig(lr=lr, warmup_steps=0, min_lr_ratio=low), total) == pytest.approx(expected, rel=1e-6)


def test_wsd_is_stable_then_linear():
    optim = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=10, decay_ratio=0.2, min_lr_ratio=0.0)
    rates = curve(optim, 100)
    assert rates[9:80] == [1.0] * 71
    drops = [a - b for a, b in itertools.pairwise(rates[79:])]
    assert drops == pytest.approx([drops[0]] * 20) and rates[-1] == 0.0


def test_warmup_ratio():
    assert warmup_steps(OptimConfig(warmup_ratio=0.02), 101) == math.ceil(2.02)
    assert warmup_steps(OptimConfig(warmup_ratio=0.5, warmup_steps=0), 100) == 0
    assert learning_rate(OptimConfig(warmup_ratio=1.0), 0, 1) > 0
