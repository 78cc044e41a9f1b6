"""Saves a trained model in the format for what was trained: whole, adapter, partial or compact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from ds_llm.compat.peft import is_adapter, without_wrapper
from ds_llm.data.chat_templates import turn_end
from ds_llm.data.tokenizer import save_tokenizer
from ds_llm.pretrained import lora as adapters
from ds_llm.pretrained import partial, parts
from ds_llm.sparsity import compact_checkpoint
from ds_llm.sparsity.model import is_sparse


def stop_at_turn_end(model: nn.Module, tokenizer) -> None:
    """Have the model's `generation_config` stop where a turn of the chat template ends, beside where it stops already.

    Tools that do not know the template, such as transformers and vLLM, then stop there as `launch/generate.py` does.
    """
    end = turn_end(tokenizer)
    if end is None or not model.can_generate():
        return
    ends = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if end not in ends:
        model.generation_config.eos_token_id = [*(i for i in ends if i is not None), end]


def save(model: nn.Module, weights: dict[str, Tensor], tokenizer, folder: Path) -> None:
    """Write whole `weights` and the tokenizer as a Hugging Face, peft, partial or compact folder."""
    stop_at_turn_end(without_wrapper(model), tokenizer)
    if partial.is_partial(model):
        partial.save(model, weights, folder)
    elif is_adapter(model):
        adapters.save_adapter(model, weights, folder)
    elif is_sparse(model):
        compact_checkpoint.save(model, weights, folder)
    else:
        model.save_pretrained(folder, state_dict=weights)
    save_tokenizer(tokenizer, folder)


def save_sharded(
    model: nn.Module, collect: Callable[..., dict[str, Tensor]], tokenizer, folder: Path, writers: Sequence[int]
) -> None:
    """Write the same folder as `save` from weights that ranks share. Collective.

    collect(keeper, trained_only=False): see `ds_llm.engine.engine.Engine.gather`. writers: ranks that share the folder.
    Each writes files of a whole model; what is smaller, the first of them writes alone.
    """
    first = dist.get_rank() == writers[0]
    if not (partial.is_partial(model) or is_adapter(model) or is_sparse(model)):
        stop_at_turn_end(model, tokenizer)
        parts.write(model, collect, folder, writers)
        if first:
            save_tokenizer(tokenizer, folder)
        return
    weights = collect(lambda name: writers[0], trained_only=is_adapter(model) or partial.is_partial(model))
    if first:
        save(model, weights, tokenizer, folder)
