"""Masks of kept weights: the mask file beside a pruned model, and masks from a model's zeros.

`masks.safetensors` holds a uint8 tensor [rows, ceil(columns / 8)] per pruned parameter, under the parameter's name as
in `model.named_parameters()`: bit i of byte j tells whether column 8 j + i is kept, and bits past the last column are 0
(the layout of `ds_llm.kernels.packed_mask.PackedMask`). Rows are the product of the leading dimensions, so experts
[E, R, C] have E * R. The file's metadata holds strings: `format`, `version`, `shapes` (JSON, shape by name), and from
the writer method, density, pattern, scope and versions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ds_llm.errors import UserError, first_line
from ds_llm.kernels.packed_mask import UNPACK, PackedMask
from ds_llm.sparsity.targets import prunable

FILE, FORMAT, VERSION = "masks.safetensors", "ds_llm masks", "1"
# share of exact zeros from which a weight counts as pruned: dense 16-bit models have some by rounding
ZERO_SHARE = 0.05
UNPACKED_COUNTS = UNPACK.view(torch.uint8).view(256, 8).sum(1, dtype=torch.int64)  # bits set in each value of a byte


def save_masks(folder: str | os.PathLike, masks: Mapping[str, PackedMask | Tensor], meta: Mapping[str, str]) -> Path:
    """Write `masks.safetensors` into an existing folder and return its path.

    masks: by parameter name, each a `PackedMask` or a bool tensor [..., C] of the parameter's shape, True where kept.
    meta: strings for the file's metadata. Equal masks and metadata give equal bytes.
    """
    packed = {
        name: mask if isinstance(mask, PackedMask) else PackedMask.from_dense(mask)
        for name, mask in sorted(masks.items())
    }
    about = dict(meta) | {
        "format": FORMAT,
        "version": VERSION,
        "shapes": json.dumps({name: list(mask.shape) for name, mask in packed.items()}),
    }
    path = Path(folder) / FILE
    path.write_bytes(_ordered(save({name: mask.bits.cpu().contiguous() for name, mask in packed.items()}, about)))
    return path


def _ordered(content: bytes) -> bytes:
    """A safetensors file with sorted keys of the metadata; the library writes them in a random order."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data behind it stay aligned
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def load_masks(source: str | os.PathLike) -> dict[str, PackedMask]:
    """Masks by parameter name, on the CPU. source: a mask file or its folder.

    Raises `UserError` for a file that is missing, damaged or not a mask file.
    """
    path = mask_file(source)
    if not path.is_file():
        raise UserError(f"{path}: no such mask file; launch/prune.py writes one beside the pruned model")
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != FORMAT:
                raise UserError(f"{path}: not a mask file of launch/prune.py")
            if meta.get("version") != VERSION:
                raise UserError(f"{path}: version {meta.get('version')} of the format, this program reads {VERSION}")
            shapes = json.loads(meta["shapes"])
            return {name: from_bits(file.get_tensor(name), shapes[name]) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: damaged or incomplete ({first_line(error)})") from None


def read_meta(source: str | os.PathLike) -> dict[str, str]:
    """The metadata of a mask file (method, density, ...), {} where there is none."""
    path = mask_file(source)
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or incomplete ({error})") from None


def mask_file(source: str | os.PathLike) -> Path:
    """Path of a mask file. source: the file or its folder."""
    path = Path(os.path.expanduser(str(source)))
    return path / FILE if path.is_dir() or path.suffix != ".safetensors" else path


def from_bits(bits: Tensor, shape: list[int]) -> PackedMask:
    """The mask of `shape` with these packed bits. Raises ValueError where their number is wrong."""
    columns = shape[-1]

    if bits.dtype != torch.uint8 or bits.dim() != 2:
        raise ValueError(f"a mask is {bits.dtype} {list(bits.shape)}, not uint8 of two dimensions")
    if columns % 8 and bits.numel() and int(bits[:, -1].max()) >> (columns % 8):
        raise ValueError("bits are set behind the last column")
    offsets = torch.zeros(bits.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(UNPACKED_COUNTS[bits.int()].sum(1), 0, out=offsets[1:])
    return PackedMask(bits, offsets, tuple(shape))


def masks_from_zeros(
    source: nn.Module | Iterable[tuple[str, Tensor]],
    min_zero_share: float = ZERO_SHARE,
    include: Iterable[str] = (),
) -> dict[str, PackedMask]:
    """Masks, by name, of weights that are pruned already: weights that are not exactly 0 are kept.

    source: a causal language model, of which linear layers and experts are examined (with `include` also the "head" or
    the "embeddings"); or (name, tensor) pairs, of which all tensors with two or more dimensions are. Weights with a
    smaller share of zeros than `min_zero_share` are dense and get no mask. A kept weight with the value 0 counts as
    pruned here; only a mask file can say otherwise.
    """
    if isinstance(source, nn.Module):
        source = ((target.name, target.weight) for target in prunable(source, include))
    masks = {}
    for name, tensor in source:
        if tensor.dim() < 2 or not tensor.is_floating_point() or not tensor.numel():
            continue
        kept = tensor.detach() != 0
        if 1 - int(kept.sum()) / kept.numel() >= min_zero_share:
            masks[name] = PackedMask.from_dense(kept.cpu())
    return masks
