"""The tokenizer that a run on conversations starts from."""

from __future__ import annotations

from ds_llm.config.run import Config
from ds_llm.data.chat_templates import set_template
from ds_llm.pretrained.added_tokens import add_tokens


def start_tokenizer(config: Config):
    """The tokenizer of `data.tokenizer` or `model.path` with added tokens and the chat template as configured.

    Raises `UserError` for tokens that cannot be added, or a template that cannot be used with it.
    """
    from ds_llm.pretrained.loading import load_tokenizer

    tokenizer = load_tokenizer(config.data.tokenizer or config.model.path)
    if config.model.add_tokens:
        add_tokens(tokenizer, config.model.add_tokens)
    if config.data.chat_template is not None:
        set_template(tokenizer, config.data.chat_template)
    return tokenizer
