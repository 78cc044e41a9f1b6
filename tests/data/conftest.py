"""A small tokenizer and random documents, shared by the tests of preparation."""

import json
import os
import random

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def random_text(rng: random.Random, words: int) -> str:
    """Lower-case words with digits, accents and line breaks among them."""
    alphabet = "abcdefghijklmnopqrstuvwxyzäé"
    return " ".join(
        rng.choice(["\n\n", "42", "naïve", "—", "the", "of"])
        if rng.random() < 0.2
        else "".join(rng.choices(alphabet, k=rng.randint(1, 8)))
        for _ in range(words)
    ).strip() + rng.choice("abcxyz")


def write_jsonl(path, rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)  # shown when a test fails
    return random.Random(seed)


@pytest.fixture
def texts(rng) -> list[str]:
    return [random_text(rng, rng.randint(1, 60)) for _ in range(60)]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A tokenizer of 400 tokens, trained once."""
    from ds_llm.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(1)
    write_jsonl(folder / "train.jsonl", [{"text": random_text(rng, 50)} for _ in range(200)])
    train_tokenizer([folder / "train.jsonl"], folder / "tokenizer", vocab_size=400)
    return folder / "tokenizer"
