"""How long training samples are, and how long the model lets them be."""

from __future__ import annotations

from ds_llm.config.run import Config
from ds_llm.errors import UserError


def lengths(config: Config) -> tuple[int, int | None]:
    """Tokens of a training sample, and the positions that the model has (None: as many as one likes).

    Raises `UserError` where the first are more than the second.
    """
    from ds_llm.pretrained.loading import load_model_config

    if config.model.path is None:
        limit = config.model.max_seq_len
    else:
        limit = getattr(load_model_config(config.model.path).get_text_config(), "max_position_embeddings", None)
    seq_len = config.data.seq_len or min(limit or config.model.max_seq_len, config.model.max_seq_len)
    if limit and seq_len > limit:
        raise UserError(f"data.seq_len: {seq_len} tokens are more than the model's {limit} positions")
    return seq_len, limit
