"""Prunes a causal language model: `launch/prune.py`."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ds_llm import hardware
from ds_llm.convert.export import output_dtype
from ds_llm.data.tokenizer import save_tokenizer
from ds_llm.distributed.environment import world_size
from ds_llm.errors import ConfigError, UserError
from ds_llm.files import free_folder, new_folder, writing
from ds_llm.pretrained.lengths import max_positions
from ds_llm.pretrained.loading import load_model, load_model_config, load_tokenizer
from ds_llm.pretrained.source import detect_model_type
from ds_llm.progress import console
from ds_llm.pruning.blockwise import CALIBRATED, METHODS, Pruned, prune_model
from ds_llm.pruning.calibrate import Windows, draw_windows
from ds_llm.pruning.scores import Pattern
from ds_llm.sparsity.masks import ZERO_SHARE, load_masks, mask_file, masks_from_zeros, save_masks
from ds_llm.sparsity.targets import BOOSTED, INCLUDE

SCOPES = {"magnitude": "layer", "wanda": "row", "sparsegpt": "layer"}  # of the papers
REPORT = "pruning.json"


@dataclass(frozen=True)
class Options:
    """Options of `prune`. None means the default of the method or of the model.

    method: magnitude, wanda, sparsegpt, or mask to use given masks. density: share of weights that are kept. pattern:
    an N:M pattern instead of a density. scope: weights compete within a row or within a layer. data: calibration files,
    and `field` names the field with the text. sequences, length, seed: number of calibration windows, their tokens, and
    the seed that draws them. damping: SparseGPT's. include: head, embeddings. masks: a mask file or a pruned model, for
    the method mask. dtype: of the written weights; auto keeps that of the file. An option that the method does not use
    must be None.
    """

    method: str
    density: float | None = None
    pattern: str | None = None
    scope: str | None = None
    data: tuple[str, ...] = ()
    field: str | None = None
    sequences: int | None = None
    length: int | None = None
    seed: int | None = None
    damping: float | None = None
    include: tuple[str, ...] = ()
    masks: str | None = None
    dtype: str = "auto"

    def check(self) -> Pattern | None:
        """The pattern to prune to, None for the method mask. Raises `ConfigError`."""
        if self.method not in (*METHODS, "mask"):
            raise ConfigError(f"method '{self.method}': must be {', '.join(METHODS)} or mask")
        useless = {
            "mask": ("density", "pattern", "scope", "include"),
            "magnitude": ("masks",),
            "wanda": ("masks", "damping"),
            "sparsegpt": ("masks",),
        }[self.method]
        if self.method not in CALIBRATED:
            useless += ("data", "field", "sequences", "length", "seed", "damping")
        for name in useless:
            if getattr(self, name) not in (None, ()):
                raise ConfigError(f"{name}: the method {self.method} has no use for it; leave it out")
        if self.method in CALIBRATED and not self.data:
            raise ConfigError(f"data: the method {self.method} needs calibration text; name text or token files")
        for name, least in (("sequences", 1), ("length", 2), ("seed", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ConfigError(f"{name} {getattr(self, name)}: must be {least} or more")
        if self.damping is not None and not self.damping > 0:
            raise ConfigError(f"damping {self.damping:g}: must be above 0")
        for name in self.include:
            if name not in INCLUDE:
                raise ConfigError(f"include '{name}': must be {' or '.join(INCLUDE)}")
        if self.method == "mask":
            if self.masks is None:
                raise ConfigError("masks: the method mask needs a mask file or a pruned model to take the masks of")
            return None
        if self.pattern is not None and self.scope is not None:
            raise ConfigError(f"scope: a {self.pattern} pattern compares the weights of a group; leave it out")
        return Pattern.parse(self.density, self.pattern, self.scope or SCOPES[self.method])


def prune(source: str | os.PathLike, out: str | os.PathLike, options: Options) -> dict:
    """Prune the model at `source` and write it to folder `out`, with `masks.safetensors` and `pruning.json`.

    source: whatever `ds_llm.pretrained.loading.load_model` takes. Returns the content of `pruning.json`. Raises
    `ConfigError` or `UserError` before weights are loaded where that is possible; nothing is left at `out` then.
    """
    pattern = options.check()
    if world_size() > 1:
        raise UserError("pruning runs in one process: start it with python, without a launcher")
    out = free_folder(out)
    if detect_model_type(source) == "qwen_boost":
        raise UserError(f"{source}: {BOOSTED}")
    start = time.perf_counter()
    dtype = output_dtype(source, options.dtype)
    tokenizer = load_tokenizer(source)
    with new_folder(out) as partial:
        windows, calibration = _calibration(source, tokenizer, options)
        model = load_model(source, dtype)
        size = sum(tensor.nbytes for tensor in model.parameters())
        if shutil.disk_usage(partial).free < 1.1 * size:
            raise UserError(f"{out}: the disk has too little space for the model, about {1.1 * size / 1e9:.1f} GB")
        damping = 0.01 if options.damping is None else options.damping
        if options.method == "mask":
            done = _apply(model, options.masks)
        else:
            _refuse_pruned(source, model)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            tokens = None if windows is None else windows.tokens
            try:
                done = prune_model(
                    model, options.method, pattern, tokens, damping=damping, include=options.include, device=device
                )
            except torch.cuda.OutOfMemoryError:
                raise UserError("the GPU has too little memory for a block and its inputs; lower --length") from None
            _warn(done)
        about = {
            "method": options.method,
            "pattern": str(pattern) if pattern else None,
            "scope": pattern.scope if pattern and not pattern.m else None,
            "damping": damping if options.method == "sparsegpt" else None,
            "include": list(options.include),
            "masks": options.masks,
            "model": str(source),
            "dtype": dtype,
            **_counts(model, done),
            "calibration": calibration,
            "layers": {name: _layer(one) for name, one in done.items()},
            "dense": [name for name, weight in model.named_parameters() if weight.dim() > 1 and name not in done],
            "seconds": round(time.perf_counter() - start, 1),
            "device": hardware.device_name(),
            "environment": hardware.environment(),
        }
        with writing(out):
            _write(partial, model, tokenizer, done, about)
    return about


def _calibration(source: str | os.PathLike, tokenizer, options: Options) -> tuple[Windows | None, dict | None]:
    """The calibration sequences, and for the report how they were drawn. Warns of rows without usable text."""
    if options.method not in CALIBRATED:
        return None, None
    positions = max_positions(load_model_config(source))
    how = {
        "sequences": 128 if options.sequences is None else options.sequences,
        "length": min(2048, positions or 2048) if options.length is None else options.length,
        "seed": options.seed or 0,
        "field": options.field or "text",
    }
    if positions and how["length"] > positions:
        raise UserError(f"length {how['length']:,}: longer than the {positions:,} positions of {source}")
    windows = draw_windows(options.data, tokenizer, **how)
    how |= {"data": [str(path) for path in options.data], "candidates": windows.candidates}
    how["rejected"] = [dict(zip(("file", "row", "reason"), entry, strict=True)) for entry in windows.rejected]
    if windows.rejected:
        file, row, reason = windows.rejected[0]
        console.print(
            f"warning: {len(windows.rejected):,} rows left out, first {file} row {row}: {reason}; all are in {REPORT}"
        )
    return windows, how


def _counts(model: nn.Module, done: Mapping[str, Pruned]) -> dict:
    weights = sum(one.mask.shape.numel() for one in done.values())
    kept = sum(one.mask.nnz for one in done.values())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"density": kept / weights, "kept": kept, "weights": weights, "parameters": parameters}


def _layer(one: Pruned) -> dict:
    found = {"shape": list(one.mask.shape), "kept": one.mask.nnz, "density": one.density}
    return found | ({"tokens": one.tokens, "dead_inputs": one.dead, "unseen": one.unseen} if one.tokens else {})


def _apply(model: nn.Module, source: str) -> dict[str, Pruned]:
    """Prune by the masks of a mask file or, where there is none, by the zeros of the pruned model at `source`."""
    if mask_file(source).is_file() or str(source).endswith(".safetensors"):
        masks = load_masks(source)
    else:
        masks = masks_from_zeros(load_model(source))
    if not masks:
        raise UserError(f"{source}: holds no mask file, and no weight with {ZERO_SHARE:.0%} of zeros or more")
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in weights:
            raise UserError(f"{source}: has a mask for {name}, a weight that the model lacks")
        if weights[name].shape != mask.shape:
            raise UserError(
                f"{source}: the mask of {name} has shape {list(mask.shape)}, the weight {list(weights[name].shape)}"
            )
        weights[name].data.masked_fill_(~mask.to_dense(), 0)
    return {name: Pruned(masks[name], []) for name in weights if name in masks}


def _refuse_pruned(source: str | os.PathLike, model: nn.Module) -> None:
    zeros = masks_from_zeros(model)
    if zeros:
        name, mask = next(iter(zeros.items()))
        raise UserError(
            f"{source}: is pruned already ({len(zeros)} weights with zeros, {name} keeps "
            f"{mask.nnz / mask.shape.numel():.1%}); prune the dense model, or take over its masks with "
            f"--method mask --masks {source}"
        )


def _warn(done: Mapping[str, Pruned]) -> None:
    """Warn of weaknesses of the calibration."""
    unseen = sum(one.unseen for one in done.values())
    if unseen:
        console.print(
            f"warning: {unseen} matrices were given no calibration token and were pruned by magnitude; more "
            "calibration text reaches more experts"
        )
    weak = [name for name, one in done.items() if any(0 < count < one.mask.shape[-1] for count in one.tokens)]
    if weak:
        console.print(
            f"warning: {len(weak)} weights saw fewer calibration tokens than they have inputs, first {weak[0]}; more "
            "calibration text makes a better choice"
        )


def _write(folder: Path, model: nn.Module, tokenizer, done: Mapping[str, Pruned], about: dict) -> None:
    versions = about["environment"]["versions"]
    meta = {name: str(about[name]) for name in ("method", "pattern", "scope", "density") if about[name] is not None}
    meta |= {name: versions[name] for name in ("ds_llm", "torch", "transformers") if name in versions}
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    save_masks(folder, {name: one.mask for name, one in done.items()}, meta)
    (folder / REPORT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
