"""Fingerprints of a model, from its weights in memory or from its files."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from ds_llm.pretrained.source import locate

EDGE_BYTES = 1 << 20  # read at both ends of a weight file to recognise it

HASH_BYTES = 64 << 20


def model_fingerprint(model: nn.Module) -> str:
    """sha256 (hex) of all whole weights and buffers of a model: their names, types, shapes and bytes."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        found = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        for piece in flat.split(HASH_BYTES):
            found.update(piece.cpu().numpy())
        return found.digest()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing releases the interpreter's lock
        return hashlib.sha256(b"".join(pool.map(digest, sorted(state.items())))).hexdigest()


def identity(path: str) -> str:
    """SHA-256 (hex) of the weight files' names, sizes, first and last megabyte; for a hub name, that name."""
    source = locate(path)
    folder = Path(source.name)
    if not folder.is_dir():
        return source.name
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    files = [folder / source.gguf] if source.gguf else files
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as content:
            digest.update(content.read(EDGE_BYTES))
            content.seek(max(size - EDGE_BYTES, 0))
            digest.update(content.read(EDGE_BYTES))
    if source.adapter:
        digest.update(identity(source.base()).encode())
    return digest.hexdigest()
