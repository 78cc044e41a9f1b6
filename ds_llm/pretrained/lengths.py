"""How long training samples are, and how long sequences of a model may be."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ds_llm.config.run import Config
from ds_llm.errors import UserError
from ds_llm.pretrained.architecture import architecture


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence in tokens that a model with this configuration takes; None: no limit is given."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def lengths(config: Config) -> tuple[int, int | None]:
    """Tokens of a training sample, and the longest sequence that the model takes (None: no limit is given).

    Raises `UserError` where the sample is longer.
    """
    limit = max_positions(architecture(config))
    seq_len = config.data.seq_len or min(limit or config.model.max_seq_len, config.model.max_seq_len)
    if limit and seq_len > limit:
        raise UserError(f"data.seq_len: {seq_len} tokens are more than the model's {limit} positions")
    return seq_len, limit
