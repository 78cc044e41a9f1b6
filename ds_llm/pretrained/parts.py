"""Writes a whole model by several ranks together: each writes files of its own, so that none holds the whole model.

The files are those of transformers, `model-00001-of-00008.safetensors` and so on with an index. What is in each depends
on the model alone, not on the number of ranks.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from ds_llm.compat.deepspeed import unpartitioned_numel
from ds_llm.compat.transformers import save_on_this_rank
from ds_llm.distributed.collectives import gather
from ds_llm.pretrained.weight_files import INDEX, WEIGHTS
from ds_llm.progress import progress

LARGEST = 5_000_000_000  # bytes of a file
SMALLEST, MOST_FILES = 500_000_000, 64  # a model in smaller files, or in more, gains nothing
LAYER = re.compile(r"(.*?\.\d+)\.")

# (name of a weight -> the rank that keeps it, or None) -> the whole weights that this rank keeps, by name; collective
Gather = Callable[[Callable[[str], int | None]], dict[str, Tensor]]


def together(name: str) -> str:
    """What a weight is written with: its layer or its module. Some files join weights of a layer."""
    match = LAYER.match(name)
    return match[1] if match else name.rpartition(".")[0]


def files_of(sizes: Iterable[tuple[str, int]], smallest: int = SMALLEST) -> dict[str, int]:
    """The number of the file for each group of weights that are written together.

    sizes: names of weights and their bytes, in the model's order. smallest: bytes of a file, unless the model ends.
    """
    groups: dict[str, int] = {}
    for name, size in sizes:
        groups[together(name)] = groups.get(together(name), 0) + size
    limit = min(LARGEST, max(smallest, sum(groups.values()) // MOST_FILES))
    found, number, filled = {}, 0, 0
    for group, size in groups.items():
        if filled and filled + size > limit:
            number, filled = number + 1, 0
        found[group], filled = number, filled + size
    return found


def write(
    model: nn.Module, collect: Gather, folder: Path, writers: Sequence[int] = (0,), smallest: int = SMALLEST
) -> None:
    """Write the folder of a transformers model with its configuration. Collective.

    writers: the ranks that write, which share the folder; each holds one file at a time in memory. smallest: see
    `files_of`.
    """
    sizes = [(name, unpartitioned_numel(p) * p.element_size()) for name, p in model.named_parameters()]
    files, mine = files_of(sizes, smallest), []
    count, rank = max(files.values()) + 1, dist.get_rank()
    with progress("writing the model", count, "files") as task:
        for first in range(0, count, len(writers)):
            turns = dict(enumerate(writers[: count - first], first))  # who keeps which file in this round

            def keeper(name: str, turns: dict[int, int] = turns) -> int | None:
                return turns.get(files.get(together(name), 0))

            weights = collect(keeper)
            for number in [number for number, writer in turns.items() if writer == rank]:
                place = folder / f".part-{number:05d}"
                save_on_this_rank(model, place, weights, LARGEST)
                mine += [(number, path.name, _content(path)) for path in sorted(place.glob("*.safetensors"))]
            del weights
            task.advance(len(turns))
    _join(folder, mine, writers[0], sum(unpartitioned_numel(p) for p in model.parameters()))


def _join(folder: Path, mine: list[tuple[int, str, dict[str, int]]], first: int, parameters: int) -> None:
    """Give the files their names, and write the index where there are several. Collective."""
    written = sorted(entry for entries in gather(mine) for entry in entries)
    names, rank = {}, dist.get_rank()
    for i, (number, name, _) in enumerate(written):
        last = f"{WEIGHTS.removesuffix('.safetensors')}-{i + 1:05d}-of-{len(written):05d}.safetensors"
        names[number, name] = WEIGHTS if len(written) == 1 else last
    for number, name, _ in mine:
        (folder / f".part-{number:05d}" / name).rename(folder / names[number, name])
    if rank == first:
        for path in (folder / ".part-00000").glob("*.json"):
            if path.name != INDEX:
                path.rename(folder / path.name)
        if len(written) > 1:
            places = {key: names[number, name] for number, name, content in written for key in content}
            size = sum(sum(content.values()) for _, _, content in written)
            about = {"total_parameters": parameters, "total_size": size}
            text = json.dumps({"metadata": about, "weight_map": places}, indent=2, sort_keys=True)
            (folder / INDEX).write_text(text + "\n")
    for number in {number for number, _, _ in mine}:
        shutil.rmtree(folder / f".part-{number:05d}")
    dist.barrier()


def _content(path: Path) -> dict[str, int]:
    """The tensors of a safetensors file, with their bytes."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        name: entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }
