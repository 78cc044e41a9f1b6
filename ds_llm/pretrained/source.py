"""Finds the model that a user names, and its kind.

A name is a hub name, a Hugging Face folder, the output folder of a run or one of its checkpoints (their `model/` is
used), a `.gguf` file, or a folder with a peft adapter or with the trained part of a model.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from transformers import PreTrainedConfig

from ds_llm.compat.transformers import find_adapter_config_file
from ds_llm.errors import UserError

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
BOOST_KEYS = ("ensemble_config", "num_submodels", "num_sub_models")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # each may be in parts, with an index
PARTIAL_FILE = "partial_config.json"  # of `ds_llm.pretrained.partial`
BOOST_FILES = ("ensemble_weights.json", "submodel_weights.json")


@dataclass(frozen=True)
class Source:
    """A model's files. name: folder or hub name. gguf: the file in it, if any. adapter: the file that describes an
    adapter or the trained part of a model, if any."""

    name: str
    gguf: str | None = None
    adapter: str | None = None

    def base(self) -> str:
        """Name of an adapter's base model."""
        try:
            name = json.loads(Path(self.adapter).read_text())["base_model_name_or_path"]
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.adapter}: cannot be read ({error})") from None
        except (KeyError, TypeError):
            name = None
        if not isinstance(name, str) or not name:
            raise UserError(f"{self.adapter}: names no base model (base_model_name_or_path)")
        if os.path.realpath(name) == os.path.realpath(self.name):
            raise UserError(f"{self.adapter}: names itself as its base model (base_model_name_or_path)")
        return name


def locate(path: str | os.PathLike) -> Source:
    """Resolve a user's name (see the module) to files that transformers can read. Raises `UserError` for a bad one."""
    name = os.path.expanduser(str(path))
    local = Path(name)
    if not name:
        raise UserError("the model's name is empty")
    if local.is_file():
        if local.suffix == ".gguf":
            return Source(str(local.parent), gguf=local.name)
        raise UserError(f"{name}: is a file; name a model folder or a .gguf file")
    if local.is_dir():
        return _locate_folder(local)
    if local.is_absolute() or name.startswith(".") or not HUB_NAME.fullmatch(name) or name.endswith(".gguf"):
        raise UserError(f"{name}: no such file or folder{nearest(local)}")
    return Source(name, adapter=_adapter(name))


def _locate_folder(folder: Path) -> Source:
    for place in (folder, folder / "model"):
        for name in ("adapter_config.json", PARTIAL_FILE):
            if (place / name).is_file():
                return Source(str(place), adapter=str(place / name))
        if (place / "config.json").is_file():
            return Source(str(place))
    ggufs = sorted(p.name for p in folder.glob("*.gguf"))
    if ggufs:
        raise UserError(f"{folder}: name one of its GGUF files, for example {folder / ggufs[0]}")
    saved = sorted(folder.glob("checkpoints/step-*/model"))
    if saved:
        raise UserError(f"{folder}: this run has no final model yet; name a checkpoint: {saved[-1].parent}")
    inner = sorted({*folder.glob("*/config.json"), *folder.glob("*/model/config.json")})
    hint = did_you_mean([path.parent for path in inner])
    raise UserError(f"{folder}: no config.json here, so this is not a model folder{hint}")


def check_index(folder: Path) -> None:
    """Raise `UserError` where the index of a model's weight files names one outside of the folder."""
    for path in (folder / f"{name}.index.json" for name in WEIGHT_FILES):
        if not path.is_file():
            continue
        try:
            index = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict):
            raise UserError(f"{path}: is damaged: it has no weight_map")
        for name in names.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{path}: names the file {name!r}; only files of this folder are read")


def _adapter(hub_name: str) -> str | None:
    _go_offline_without_network()
    try:
        return find_adapter_config_file(hub_name)
    except (OSError, ValueError):
        return None  # loading the configuration says what is wrong with the name


def _go_offline_without_network() -> None:
    """Use only the cache for hub names where the hub's address does not resolve; each file would be retried."""
    if constants.HF_HUB_OFFLINE or getproxies():
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def nearest(missing: Path) -> str:
    parent = missing.parent
    if not parent.is_dir():
        return f" (nor is there a folder {parent})"
    close = difflib.get_close_matches(missing.name, [p.name for p in parent.iterdir()], n=1)
    return did_you_mean([parent / name for name in close])


def did_you_mean(close: list) -> str:
    return f"; did you mean {close[0]}?" if close else ""


def detect_model_type(path: str | os.PathLike) -> str:
    """ "qwen_boost" for a boosted model, else "standard"; for an adapter, the kind of its base model.

    A boosted model has one of `BOOST_KEYS` in its config.json, or an architecture there with "Boost" or "Ensemble" in
    its name, or one of `BOOST_FILES` beside it. A file that cannot be read counts as standard.
    """
    source = locate(path)
    if source.adapter:
        return detect_model_type(source.base())
    if source.gguf:
        return "standard"
    try:
        values, _ = PreTrainedConfig.get_config_dict(source.name)
    except (OSError, ValueError, RecursionError):
        values = {}
    if not isinstance(values, dict):
        return "standard"
    named = " ".join(map(str, values.get("architectures") or ()))
    boosted = (
        any(name in values for name in BOOST_KEYS)
        or "Boost" in named
        or "Ensemble" in named
        or any((Path(source.name) / name).is_file() for name in BOOST_FILES)
    )
    return "qwen_boost" if boosted else "standard"


def base_name(path: str) -> str:
    """The name of a base model that works in any working folder: a hub name, or an absolute path."""
    source = locate(path)
    name = Path(source.name)
    if not name.is_dir():
        return source.name
    return str(name.resolve() / source.gguf) if source.gguf else str(name.resolve())
