"""Tokens that a run adds to a model's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import AddedToken
from torch import nn

from ds_llm.errors import ConfigError, UserError
from ds_llm.models.deferred import settle
from ds_llm.progress import console


def add_tokens(tokenizer, tokens: Sequence[str]) -> None:
    """Add the special tokens to a tokenizer that it does not have, in place.

    Raises `ConfigError` for an empty token or one that is named twice.
    """
    for token in tokens:
        if not token.strip():
            raise ConfigError("model.add_tokens: a token is empty")
        if list(tokens).count(token) > 1:
            raise ConfigError(f"model.add_tokens: {token} is named twice")
    known = [token for token in tokens if token in tokenizer.get_vocab()]
    if known:
        console.print(f"model.add_tokens: {' '.join(known)}: in the tokenizer already")
    new = [token for token in tokens if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)


def ends(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the input and the output embedding; tied ones are the same."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return [p for module in modules if module is not None for p in module.parameters(recurse=False)]


def grow(model: nn.Module, tokenizer) -> None:
    """Give both embeddings a row for each token, in place; deferred ones are settled.

    Raises `UserError` where the model cannot grow.
    """
    settle(model, only=ends(model))
    if len(tokenizer) <= model.get_input_embeddings().num_embeddings:
        return
    try:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    except Exception as error:  # a model with embeddings of its own kind, such as a boosted one
        raise UserError(f"model.add_tokens: this '{model.config.model_type}' model cannot grow ({error})") from None


@torch.no_grad()
def add_rows(model: nn.Module, tokenizer, new: Sequence[int]) -> None:
    """Give a model rows for the tokens `new` of its tokenizer, in the input and the output embedding, in place.

    Each starts as the mean of the rows of all older tokens, so that the model's predictions for these hardly change
    (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021). Rows that pad the embedding are
    used before it grows. Raises `UserError` for a model whose embedding cannot grow.
    """
    grow(model, tokenizer)
    old = torch.ones(len(tokenizer), dtype=torch.bool)
    old[list(new)] = False
    for parameter in {id(p): p for p in ends(model)}.values():  # tied embeddings are one parameter
        parameter[list(new)] = parameter[: len(tokenizer)][old].float().mean(0).to(parameter.dtype)
