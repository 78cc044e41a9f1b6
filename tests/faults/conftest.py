"""A fresh seed for every test, shown when it fails."""

import random

import pytest


@pytest.fixture(autouse=True)
def seed() -> int:
    value = random.SystemRandom().randrange(2**32)
    print(f"seed {value}")
    random.seed(value)
    return value


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=6, help="random kills of the fault tests (default 6)")
