"""The trained part of a model with frozen weights: a small folder that is loaded onto its base model.

`partial_model.safetensors` holds the whole trained weights under their names in the model. `partial_config.json` names
the base (`base_model_name_or_path`) and identifies its weight files. Every command that takes a model takes such a
folder too.
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ds_llm.errors import UserError
from ds_llm.models.deferred import in_place_of, replace
from ds_llm.pretrained.fingerprint import identity
from ds_llm.pretrained.source import PARTIAL_FILE, base_name
from ds_llm.pretrained.trained import trained_names

WEIGHTS_FILE = "partial_model.safetensors"
SHA256_DIGITS = 64


def mark(model: nn.Module, base: str) -> None:
    """Make a run save only the weights of `model` that require gradients. base: name of the loaded model."""
    model.partial_base = base


def is_partial(model: nn.Module) -> bool:
    """Whether `mark` was called for the model."""
    return getattr(model, "partial_base", None) is not None


def save(model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the folder from the gathered `weights`.

    Raises `UserError` where a weight is missing or empty, as in a sharded model that was not gathered.
    """
    names = trained_names(model, weights, f"{folder}: the trained part")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weights[name].contiguous() for name in names}, folder / WEIGHTS_FILE)
    found = {"base_model_name_or_path": base_name(model.partial_base), "base_identity": identity(model.partial_base)}
    (folder / PARTIAL_FILE).write_text(json.dumps(found, indent=2) + "\n")


@torch.no_grad()
def load(model: nn.Module, folder: Path, base: str) -> nn.Module:
    """Load the trained part in `folder` onto its base model, in place, and return it. base: name of the loaded base.

    Raises `UserError` where the part was trained on another model, or the file is damaged.
    """
    asked = json.loads((folder / PARTIAL_FILE).read_text()).get("base_identity", "")
    found = identity(base)
    if len(asked) == len(found) == SHA256_DIGITS and asked != found:
        raise UserError(f"{folder}: was trained on other weights than those in {base} now")
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS_FILE}: cannot be read ({error})") from None
    parameters, values = dict(model.named_parameters()), {}
    for name, value in weights.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise UserError(f"{folder}: does not fit its base model {base}: it has no {name} {list(value.shape)}")
        values[id(parameters[name])] = value.to(parameters[name].dtype)
    replace(model, lambda old: in_place_of(old, values[id(old)]) if id(old) in values else old)
    return model
