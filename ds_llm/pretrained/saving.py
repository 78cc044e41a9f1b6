"""A trained model on disk, in the format that fits what was trained of it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ds_llm.compat.peft import is_adapter
from ds_llm.data.tokenizer import save_tokenizer
from ds_llm.pretrained import lora as adapters
from ds_llm.pretrained import partial
from ds_llm.sparsity import compact_checkpoint
from ds_llm.sparsity.model import is_sparse


def needs_trained_only(model: nn.Module) -> bool:
    """Whether `save` takes the trained weights alone: of adapters, and of a model that is saved in part."""
    return is_adapter(model) or partial.is_partial(model)


def save(model: nn.Module, weights: dict[str, Tensor], tokenizer, folder: Path) -> None:
    """Write `weights`, as gathered, into `folder`: a Hugging Face, peft, partial or compact one, with the tokenizer."""
    if partial.is_partial(model):
        partial.save(model, weights, folder)
    elif is_adapter(model):
        adapters.save_adapter(model, weights, folder)
    elif is_sparse(model):
        compact_checkpoint.save(model, weights, folder)
    else:
        model.save_pretrained(folder, state_dict=weights)
    save_tokenizer(tokenizer, folder)
