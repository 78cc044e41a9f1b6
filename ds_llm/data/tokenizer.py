"""Training and loading tokenizers."""

from __future__ import annotations

import os

from ds_llm.errors import UserError


def load_tokenizer(path: str | os.PathLike):
    """The tokenizer in a folder, or of that name on the hub. `UserError` when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: no tokenizer could be loaded from here ({reason})") from None
