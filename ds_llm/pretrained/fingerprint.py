"""Fingerprints of a model, from its weights in memory or from its files."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_llm.distributed.collectives import gather
from ds_llm.models.deferred import read
from ds_llm.pretrained.source import locate

EDGE_BYTES = 1 << 20  # read at both ends of a weight file to recognise it

HASH_BYTES = 64 << 20


def model_fingerprint(model: nn.Module) -> str:
    """sha256 (hex) of all whole weights and buffers of a model: their names, types, shapes and bytes.

    Within a process group the ranks hash a share each. It is collective there: all ranks must hold the same weights.
    """
    state = sorted((name, tensor.detach()) for name, tensor in model.state_dict().items())
    joined = dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        found = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        count = max(HASH_BYTES // tensor.element_size(), 1)
        for start in range(0, tensor.numel(), count):
            end = min(start + count, tensor.numel())
            piece = torch.empty(end - start, dtype=tensor.dtype)
            read(tensor, start, end, piece)
            found.update(piece.view(torch.uint8).numpy())
        return found.digest()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing releases the interpreter's lock
        own = list(pool.map(digest, state[rank::ranks]))
    shares = gather(own) if joined else [own]
    digests = [shares[number % ranks][number // ranks] for number in range(len(state))]
    return hashlib.sha256(b"".join(digests)).hexdigest()


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
