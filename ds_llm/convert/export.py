"""Export of a trained model: its adapter merged into its base, checked, and written as a Hugging Face folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ds_llm.compat.peft import is_adapter
from ds_llm.data.tokenizer import save_tokenizer
from ds_llm.errors import UserError
from ds_llm.files import free_folder, new_folder, writing
from ds_llm.kernels.packed_mask import PackedMask
from ds_llm.pretrained.lengths import max_positions
from ds_llm.pretrained.loading import TORCH_DTYPES, Source, load_model, load_model_config, load_tokenizer, locate
from ds_llm.pretrained.saving import stop_at_turn_end
from ds_llm.sparsity import compact_checkpoint
from ds_llm.sparsity.masks import save_masks
from ds_llm.sparsity.model import check_zeros, sparsify

PROBE = (2, 48)  # rows and tokens that are compared
TOLERANCE = 1e-4  # of the largest logit: float32 rounding in a merge stays well below


@dataclass(frozen=True)
class Export:
    """A written model, and the largest differences between logits of random tokens, computed in float32.

    base: name of the base model of an adapter or of a trained part. effect: adapter on against adapter off. merge:
    merged against adapter on; both are None without an adapter. rounding: the folder read back against the model before
    the cast to `dtype`. largest: the largest logit.
    """

    folder: Path
    dtype: str
    base: str | None
    effect: float | None
    merge: float | None
    rounding: float
    largest: float


@torch.no_grad()
def export(source: str | os.PathLike, out: str | os.PathLike, dtype: str = "auto", compact: bool = False) -> Export:
    """Write the model at `source` to folder `out` as safetensors with its tokenizer and chat template.

    source: whatever `ds_llm.pretrained.loading.load_model` takes. dtype: fp32, bf16, fp16, or auto for the type of the
    base model's file. A pruned model with masks is written with exact zeros and its mask file, or with `compact` as
    kept values and bits (`ds_llm.sparsity.compact_checkpoint`). Raises `UserError` when `out` holds something, when
    the merged model's logits are not those of the model with its adapter, when merging or writing would lose zeros, or
    when the folder read back is another model; nothing is left at `out` then.
    """
    out = free_folder(out)
    place = locate(source)
    masks = _masks(place, compact)
    dtype = output_dtype(source, dtype)
    tokenizer = load_tokenizer(source)
    model = load_model(source, "fp32", merge=False)
    probe = probe_tokens(model, tokenizer)
    effect = merge = None
    reference = logits(model, probe)
    largest = float(reference.abs().max())
    if is_adapter(model):
        with model.disable_adapter():
            effect = difference(logits(model, probe), reference)
        model = model.merge_and_unload(safe_merge=True)
        merge = difference(logits(model, probe), reference)
        if not merge <= TOLERANCE * max(largest, 1.0):
            raise UserError(
                f"{source}: not exported: merging the adapter changes the logits by {merge:.3g} (largest logit "
                f"{largest:.3g})"
            )
    rounding = write(model, tokenizer, out, dtype, probe, reference, masks, compact)
    return Export(out, dtype, place.base() if place.adapter else None, effect, merge, rounding, largest)


def _masks(place: Source, compact: bool) -> dict[str, PackedMask] | None:
    """The masks of the written model; None for a dense one."""
    if place.adapter:
        if compact or compact_checkpoint.stored_masks(locate(place.base()).name) is not None:
            raise UserError(
                f"{place.name}: merging this adapter would fill the zeros of a pruned model; adapters of pruned models "
                "are trained with mode=sparse lora.enabled=true"
            )
        return None
    masks = compact_checkpoint.stored_masks(place.name)
    if compact and masks is None:
        raise UserError(f"{place.name}: has no masks, so it cannot be written compactly; launch/prune.py makes them")
    return masks


def output_dtype(source, dtype: str) -> str:
    """The given dtype, or for auto that of the file of the model or of the adapter's base."""
    if dtype != "auto":
        return dtype
    place = locate(source)
    while place.adapter:
        place = locate(source := place.base())
    config = load_model_config(source)
    names = {value: name for name, value in TORCH_DTYPES.items()}
    return names.get(config.dtype or config.get_text_config().dtype, "fp32")


def probe_tokens(model: nn.Module, tokenizer) -> torch.Tensor:
    """Random tokens for comparing models, the same for equal vocabularies: int64 [2, 48], or as many as fit."""
    limit = max_positions(model.config) or PROBE[1]
    size = (PROBE[0], min(PROBE[1], limit))
    return torch.randint(len(tokenizer), size, generator=torch.Generator().manual_seed(0))


def write(
    model: nn.Module,
    tokenizer,
    out: Path,
    dtype: str,
    probe: torch.Tensor,
    reference: torch.Tensor,
    masks: dict[str, PackedMask] | None = None,
    compact: bool = False,
) -> float:
    """Write an fp32 model to `out` as `dtype`, cast in place, and read it back; the masks of a pruned one with it.

    Returns the largest difference of the logits of `probe` to `reference`. Raises `UserError` where it is more than
    rounding, or the folder cannot be written; nothing is left at `out` then.
    """
    with new_folder(out) as partial, writing(out):
        model.to(TORCH_DTYPES[dtype])
        stop_at_turn_end(model, tokenizer)
        for name, mask in (masks or {}).items():
            check_zeros(name, model.get_parameter(name), mask)
        if compact:
            compact_checkpoint.save(sparsify(model, masks), None, partial)
        else:
            model.save_pretrained(partial)
            if masks:
                save_masks(partial, masks, {})
        save_tokenizer(tokenizer, partial)
        rounding = difference(logits(load_model(partial, "fp32"), probe), reference)
        if not rounding <= (TOLERANCE if dtype == "fp32" else 0.1) * max(float(reference.abs().max()), 1.0):
            raise UserError(f"{out}: not written: read back, the logits differ by {rounding:.3g} in {dtype}")
    return rounding


def logits(model: nn.Module, probe: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=probe, use_cache=False).logits.float()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())
