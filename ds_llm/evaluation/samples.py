"""Checks `eval.prompts` before a model is built, and answers them at every evaluation."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ds_llm.compat.peft import without_wrapper
from ds_llm.config.run import Config
from ds_llm.data import chat as chat_template
from ds_llm.errors import ConfigError
from ds_llm.generation.generator import Generator, SamplingParams


def check_prompts(config: Config, tokenizer, limit: int | None, chat: bool) -> None:
    """Raise an error for prompts that leave no room for an answer within `limit` positions. chat: see `sampling`."""
    for prompt in config.eval.prompts:
        message = _as_prompt(prompt, tokenizer, chat)
        if isinstance(message, str):
            length = len(tokenizer(message)["input_ids"])
        else:
            chat_template.check_template(tokenizer)
            try:
                text = chat_template.render(tokenizer, message, add_generation_prompt=True)
            except chat_template.Unmaskable as error:
                raise ConfigError(f"eval.prompts: {prompt[:40]!r}...: {error}") from None
            length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if limit and length >= limit:
            raise ConfigError(f"eval.prompts: {prompt[:40]!r}... has {length} tokens, the model {limit} positions")


def sampling(config: Config, tokenizer, model: nn.Module, chat: bool) -> Callable | None:
    """The function that answers the prompts greedily, see `Job.sample`; None where there are none.

    chat: as messages of a user, where the tokenizer has a chat template.
    """
    if not config.eval.prompts:
        return None
    greedy = SamplingParams(max_new_tokens=config.eval.max_new_tokens, temperature=0.0)
    plain = without_wrapper(model)
    prompts = [_as_prompt(text, tokenizer, chat) for text in config.eval.prompts]

    def sample(engine) -> list[dict]:
        texts = Generator(plain, tokenizer).batch_generate(prompts, greedy)
        return [{"prompt": p, "text": t} for p, t in zip(config.eval.prompts, texts, strict=True)]

    return sample


def _as_prompt(text: str, tokenizer, chat: bool) -> str | list[dict]:
    return [{"role": "user", "content": text}] if chat and tokenizer.chat_template else text
