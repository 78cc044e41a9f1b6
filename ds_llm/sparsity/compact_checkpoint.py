"""A sparse model on disk: kept values and mask bits of pruned weights, dense tensors for the rest.

A compact folder is a Hugging Face model folder with `sparse.safetensors` in place of `model.safetensors`. For a pruned
weight NAME the file holds `NAME.values` [nnz] and `NAME.bits` uint8 (see `ds_llm.kernels.packed_mask.PackedMask`), and
in its metadata the shapes. `sparsity.json` says how many weights of each tensor are kept and how many are not 0. At
density d a pruned weight of b bytes takes d b + 1/8.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ds_llm.errors import UserError, first_line
from ds_llm.kernels.sparse_update import PackedMask, expand
from ds_llm.models.deferred import of_file
from ds_llm.sparsity import masks as mask_files
from ds_llm.sparsity.linear import merged
from ds_llm.sparsity.masks import from_bits
from ds_llm.sparsity.model import sparse_tensors

FILE, VERSION = "sparse.safetensors", 1
ABOUT = "ds_llm_sparse"  # one key of the metadata, because safetensors writes several in a random order
TABLE = "sparsity.json"


def save(model: nn.Module, weights: dict[str, Tensor] | None, folder: str | os.PathLike) -> None:
    """Write a compact folder from the gathered `weights` of a model that `sparsify` has prepared.

    weights: parameters and persistent buffers by name, on the CPU; None: the model's own, which are not sharded. Masked
    adapters are merged into the values. Raises `UserError`, before anything is written, where a tensor does not have
    exactly the kept weights with which it started.
    """
    if weights is None:
        persistent = model.state_dict().keys()
        weights = {name: p.detach() for name, p in model.named_parameters()}
        weights |= {name: b for name, b in model.named_buffers() if name in persistent}
    folder, weights = Path(folder), dict(weights)
    tensors, shapes, table = {}, {}, []
    for name, module, leaf in sparse_tensors(model):
        path = name.removesuffix(leaf)
        values, bits = weights.pop(f"{name}_values"), weights.pop(f"{name}_mask.bits")
        weights.pop(f"{name}_mask.offsets")
        shape = getattr(module, f"{leaf}_mask").shape
        mask = from_bits(bits, list(shape))
        if not mask.nnz == values.numel() == model.kept_weights[name]:
            raise UserError(
                f"{folder}: not saved: {name} started with {model.kept_weights[name]:,} kept weights, now its mask has "
                f"{mask.nnz:,} and {values.numel():,} have a value"
            )
        if f"{path}lora_A" in weights:
            a, b = weights.pop(f"{path}lora_A"), weights.pop(f"{path}lora_B")
            values = merged(values, mask, a, b, module.lora_scale)
        tensors[f"{name}.values"], tensors[f"{name}.bits"] = values.contiguous(), bits
        shapes[name] = list(shape)
        table.append({"name": name, "shape": list(shape), "kept": mask.nnz, "nonzero": int(values.count_nonzero())})
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = values.dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    about = json.dumps({"version": VERSION, "shapes": shapes})
    save_file({n: t.contiguous() for n, t in (tensors | weights).items()}, folder / FILE, metadata={ABOUT: about})
    (folder / TABLE).write_text(json.dumps(table, indent=1))


def is_compact(folder: str | os.PathLike) -> bool:
    """Whether `folder` holds a compact checkpoint."""
    return (Path(folder) / FILE).is_file()


def load_masks(folder: str | os.PathLike) -> dict[str, PackedMask]:
    """The masks of a compact folder by name of the weight, on the CPU."""
    with _opened(folder) as (file, shapes):
        return {name: from_bits(file.get_tensor(f"{name}.bits"), shape) for name, shape in shapes.items()}


def stored_masks(folder: str | os.PathLike) -> dict[str, PackedMask] | None:
    """The masks of a compact checkpoint, or of the mask file of `launch/prune.py`; None where a folder has neither."""
    if is_compact(folder):
        return load_masks(folder)
    return mask_files.load_masks(folder) if mask_files.mask_file(folder).is_file() else None


@torch.no_grad()
def load_dense(
    folder: str | os.PathLike, dtype: torch.dtype | None = None, deferred: bool = False
) -> dict[str, Tensor]:
    """All tensors of a compact folder by name; pruned ones are dense with exact zeros.

    dtype: floating tensors are cast to it; None: as saved. deferred: nothing is read yet (`ds_llm.models.deferred`).
    Raises `UserError` for a damaged file.
    """
    with _opened(folder) as (file, shapes):
        state = {}
        for key in file.keys():  # noqa: SIM118
            name, _, part = key.rpartition(".")
            if name in shapes and part == "bits":
                continue
            tensor = of_file(file.get_slice(key)[...]) if deferred else file.get_tensor(key)
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            if name in shapes and part == "values":
                state[name] = expand(tensor, from_bits(file.get_tensor(f"{name}.bits"), shapes[name]))
            else:
                state[key] = tensor
        return state


@contextmanager
def _opened(folder: str | os.PathLike) -> Iterator[tuple[object, dict[str, list[int]]]]:
    path = Path(folder) / FILE
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            if about.get("version") != VERSION:
                raise UserError(f"{path}: not a sparse model of version {VERSION}")
            yield file, about["shapes"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: damaged or incomplete ({first_line(error)})") from None
