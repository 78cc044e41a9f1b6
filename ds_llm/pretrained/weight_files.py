"""The safetensors files of a model, mapped into memory: nothing of a tensor is read before it is used."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ds_llm.compat.transformers import cached_file, get_checkpoint_shard_files
from ds_llm.errors import UserError, first_line
from ds_llm.models.deferred import Deferred, of_file
from ds_llm.pretrained.source import WEIGHT_FILES

WEIGHTS = WEIGHT_FILES[0]
INDEX = f"{WEIGHTS}.index.json"


def weight_files(name: str) -> list[Path]:
    """The safetensors files of a model folder or hub name; none where its weights have another format.

    Files of the hub are downloaded where the cache lacks them. Raises `UserError` for an index that names a file which
    is not there.
    """
    if (one := _file(name, WEIGHTS)) is not None:
        return [one]
    index = _file(name, INDEX)
    if index is None:
        return []
    if not Path(name).is_dir():
        return [Path(path) for path in get_checkpoint_shard_files(name, str(index))[0]]
    files = sorted({index.parent / file for file in json.loads(index.read_text())["weight_map"].values()})
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file, but {index} names it")
    return files


def mapped(name: str) -> dict[str, Deferred] | None:
    """All tensors of a model folder or hub name, by their names in its files; None where it has no safetensors files.

    Raises `UserError` for a file that is damaged or incomplete.
    """
    found = {}
    for path in weight_files(name):
        try:
            file = safe_open(path, "pt")
            found |= {key: of_file(file.get_slice(key)[...]) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: a weight file is damaged or incomplete ({first_line(error)})") from None
    return found or None


def _file(name: str, file: str) -> Path | None:
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    try:
        return Path(cached_file(name, file))
    except OSError:  # it has none, or the hub cannot be reached: transformers says which
        return None
