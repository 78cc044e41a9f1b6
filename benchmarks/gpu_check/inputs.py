"""Synthetic inputs at the sizes of real ones, because nothing can be fetched: a tokenizer, tokens, texts, models.

They lie in the folder that the steps of a call share, and are made once: each appears under its name when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

WORDS = ["red", "blue", "green", "cat", "dog", "sun", "moon", "tree", "house", "river", "stone", "bird", "wind", "rain"]


def made_once(target: Path, make: Callable[[Path], object]) -> Path:
    """`target`, made by `make` where it is not there: `make` gets a folder or file name beside it."""
    if not target.exists():
        partial = target.with_name(f"partial-{target.name}")
        shutil.rmtree(partial, ignore_errors=True)
        make(partial)
        os.replace(partial, target)
    return target


def word_tokenizer(folder: Path, words: int):
    """A tokenizer that knows `words` words w0, w1, ..., four of them special."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    names = special + [f"w{i}" for i in range(words - len(special))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {f"{name.strip('<>')}_token": name for name in special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **tokens)
    tokenizer.save_pretrained(folder)
    return tokenizer


def token_file(scratch: Path, words: int, documents: int, length: int) -> Path:
    """A token file of random documents of `length` tokens on average, and its tokenizer beside it."""
    from ds_llm.data.tokens import TokenWriter, tokenizer_hash

    def make(folder: Path) -> None:
        tokenizer = word_tokenizer(folder / "tokenizer", words)
        random = np.random.default_rng(0)
        about = {"vocab_size": words, "eos_token_id": 2, "tokenizer_hash": tokenizer_hash(tokenizer)}
        with TokenWriter(folder / "train.bin", **about, tokenizer=str(folder / "tokenizer")) as writer:
            for _ in range(documents):
                count = int(random.integers(length // 10 + 1, 2 * length))
                writer.append(np.append(random.integers(4, words, count), 2), np.array([count + 1]))

    return made_once(scratch / f"tokens-{words}", make) / "train.bin"


def sentence(random: np.random.Generator, most: int) -> str:
    return " ".join(WORDS[i] for i in random.integers(0, len(WORDS), int(random.integers(1, most + 1))))


def chat_rows(scratch: Path, rows: int, words: int) -> Path:
    """Folder with `sft.jsonl`, conversations, and `dpo.jsonl`, pairs, of up to `words` words a message."""

    def make(folder: Path) -> None:
        folder.mkdir()
        random = np.random.default_rng(0)
        with open(folder / "sft.jsonl", "w") as chats, open(folder / "dpo.jsonl", "w") as pairs:
            for _ in range(rows):
                asked, good, bad = (sentence(random, words) for _ in range(3))
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": good}]
                chats.write(json.dumps({"messages": turns}) + "\n")
                pairs.write(json.dumps({"prompt": asked, "chosen": good, "rejected": bad}) + "\n")

    return made_once(scratch / "chats", make)


def byte_tokenizer(scratch: Path, folder: Path):
    """A byte-level tokenizer, to which each of `WORDS` with a blank before it is one token; it has a chat template."""
    from ds_llm.data.tokenizer import load_tokenizer, train_tokenizer

    text = scratch / "words.jsonl"
    text.write_text(json.dumps({"text": " ".join(WORDS * 20)}) + "\n")
    train_tokenizer([text], folder, vocab_size=400)
    return load_tokenizer(folder)


def chat_model(scratch: Path, sizes: dict) -> Path:
    """An untrained Llama of these sizes."""

    def make(folder: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = byte_tokenizer(scratch, folder)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**{"vocab_size": len(tokenizer), **ids, **sizes})).save_pretrained(folder)

    return made_once(scratch / "chat-model", make)


def scoring_model(scratch: Path, sizes: dict) -> Path:
    """An untrained Qwen2 of these sizes in bf16, made on the GPU where there is one."""

    def make(folder: Path) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        byte_tokenizer(scratch, folder)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
                torch.manual_seed(0)
                model = Qwen2ForCausalLM(Qwen2Config(**sizes))
        finally:
            torch.set_default_dtype(before)
        model.save_pretrained(folder)

    return made_once(scratch / "scoring-model", make)


def texts(scratch: Path, rows: int, length: int) -> Path:
    """JSON lines `{"text"}` of `length` words, each of which is a token."""

    def make(path: Path) -> None:
        random = np.random.default_rng(1)
        with open(path, "w") as file:
            for _ in range(rows):
                text = "".join(f" {WORDS[i]}" for i in random.integers(0, len(WORDS), length))
                file.write(json.dumps({"text": text}) + "\n")

    return made_once(scratch / "texts.jsonl", make)
