"""Boosted models of several models, and their parts: `launch/convert.py`.

The logits of every result are checked before its folder appears, in float32 on the same random tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ds_llm.compat.transformers import choose_attention, chosen_attention
from ds_llm.convert.export import TOLERANCE, difference, logits, output_dtype, probe_tokens, write
from ds_llm.data.tokens import tokenizer_hash
from ds_llm.errors import UserError, first_line
from ds_llm.files import free_folder
from ds_llm.models import predecessor
from ds_llm.models.boost import QwenBoostForCausalLM
from ds_llm.models.head import logit_transform
from ds_llm.pretrained.lengths import max_positions
from ds_llm.pretrained.loading import load_model, load_tokenizer, match_tokenizer


@dataclass(frozen=True)
class Conversion:
    """A written model and its largest differences of logits.

    made: of the result to its expected logits. rounding: of the folder read back to the result before the cast to
    `dtype`. largest: the largest logit.
    """

    folder: Path
    dtype: str
    made: float
    rounding: float
    largest: float


@torch.no_grad()
def boost(
    models: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    fusion_lambda: float = 0.5,
    connection: str | None = None,
    dtype: str = "auto",
) -> Conversion:
    """Fuse models of one vocabulary into a boosted one (`ds_llm.models.boost`), in the order given, at folder `out`.

    models: at least two names for `load_model`. fusion_lambda: weight of the second of two models; more models get
    equal weights. connection: None, linear or gated: how a model gets its predecessor's states; without effect before
    it is trained. dtype: auto for that of the first model's file. The tokenizer is the last model's. Raises `UserError`
    where the models do not fit together, or the result's logits are not the vote of theirs.
    """
    if len(models) < 2:
        raise UserError("a boosted model takes at least two models")
    if not 0 <= fusion_lambda <= 1:
        raise UserError(f"lambda {fusion_lambda:g}: must be between 0 and 1")
    if len(models) > 2 and fusion_lambda != 0.5:
        raise UserError("lambda: is for two models; the logits of more are averaged")
    out = free_folder(out)
    dtype = output_dtype(models[0], dtype)
    tokenizers = [load_tokenizer(path) for path in models]
    for path, tokenizer in zip(models, tokenizers, strict=True):
        if tokenizer_hash(tokenizer) != tokenizer_hash(tokenizers[-1]):
            raise UserError(f"{path} and {models[-1]} have different tokenizers, so they cannot vote on a token")
    tokenizer, loaded = tokenizers[-1], [load_model(path, "fp32") for path in models]
    for path, model in zip(models, loaded, strict=True):
        if isinstance(model, QwenBoostForCausalLM):
            raise UserError(f"{path}: is a boosted model itself; take one out of it first (extract)")
        match_tokenizer(model, tokenizer)
    probe = probe_tokens(min(loaded, key=_positions), tokenizer)
    weights = [1 - fusion_lambda, fusion_lambda] if len(loaded) == 2 else [1 / len(loaded)] * len(loaded)
    expected = sum(w * logits(model, probe) for w, model in zip(weights, loaded, strict=True))
    try:
        fused = QwenBoostForCausalLM.from_sub_models(loaded, fusion_lambda, connection)
    except ValueError as error:
        raise UserError(
            f"{', '.join(map(str, models))}: do not fit together: {first_line(error.__cause__ or error)}"
        ) from None
    return _finish(fused, tokenizer, out, dtype, probe, expected, "the fused model's logits are not the vote")


@torch.no_grad()
def extract(
    source: str | os.PathLike,
    index: int,
    out: str | os.PathLike,
    *,
    dtype: str = "auto",
    drop_connection: bool = False,
) -> Conversion:
    """Write sub-model `index` (from 0; -1 is the last) of a boosted model as a model of its own to folder `out`.

    Raises `UserError` for a sub-model with a connection to its predecessor, which it needs. drop_connection: write it
    without the connection's weights; `made` is then how much that changes its logits.
    """
    out = free_folder(out)
    model = load_model(source, "fp32")
    if not isinstance(model, QwenBoostForCausalLM):
        raise UserError(f"{source}: is no boosted model, there is nothing to take out of it")
    count = len(model.sub_models)
    if not -count <= index < count:
        raise UserError(f"index {index}: {source} has the sub-models 0 to {count - 1}")
    index %= count
    dtype, tokenizer = output_dtype(source, dtype), load_tokenizer(source)
    probe = probe_tokens(model, tokenizer)
    fed = model.config.is_llmboost and index > 0
    within = _alone(model, index, probe)
    part = load_part(model, index)
    match_tokenizer(part, tokenizer)
    part.generation_config = model.generation_config
    tolerance = None
    if fed:
        changed = difference(logits(part, probe), within)
        if not drop_connection and changed > TOLERANCE * max(float(within.abs().max()), 1.0):
            raise UserError(
                f"{source}: sub-model {index} is fed by its predecessor; without it its logits change by up to "
                f"{changed:.3g} (largest {float(within.abs().max()):.3g}): --drop-connection takes it all the same"
            )
        tolerance = float("inf")
    failure = f"sub-model {index} has other logits by itself"
    return _finish(part, tokenizer, out, dtype, probe, within, failure, tolerance)


def load_part(model: QwenBoostForCausalLM, index: int) -> nn.Module:
    """Sub-model `index` as a separate model without its connection; it shares the weights of `model`."""
    part = model.sub_models[index]
    if not (model.config.is_llmboost and index):
        return part
    config = type(part.config).from_dict(part.config.to_dict())
    choose_attention(config, chosen_attention(part.config))
    plain = type(part)(config)
    weights = {name: value for name, value in part.state_dict().items() if not predecessor.is_connection(name)}
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    return plain.eval()


def _alone(model: QwenBoostForCausalLM, index: int, probe: torch.Tensor) -> torch.Tensor:
    """Logits of a sub-model within the boosted model, with its connection if it has one."""
    hidden = model.get_decoder()(input_ids=probe).last_hidden_state
    sizes = [part.config.get_text_config().hidden_size for part in model.sub_models]
    scale, _ = logit_transform(model.sub_models[index])
    return model.lm_head.heads[index](hidden.split(sizes, -1)[index]).float() * scale


def _finish(model, tokenizer, out: Path, dtype: str, probe, expected, failure: str, tolerance: float | None = None):
    found = logits(model, probe)
    made, largest = difference(found, expected), float(expected.abs().max())
    if not made <= (TOLERANCE * max(largest, 1.0) if tolerance is None else tolerance):
        raise UserError(f"{out}: not written: {failure}: they differ by {made:.3g} (largest {largest:.3g})")
    rounding = write(model, tokenizer, out, dtype, probe, found)
    return Conversion(out, dtype, made, rounding, largest)


def _positions(model: nn.Module) -> int:
    return max_positions(model.config) or 1 << 30
