"""The model to be proved: its configuration, and a small model of the same configuration with random weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from ds_llm.config.run import Config
from ds_llm.errors import ConfigError, UserError, first_line
from ds_llm.models.boost import QwenBoostConfig
from ds_llm.models.cut import VOCABULARY, small_configs, small_model
from ds_llm.pretrained.architecture import architecture
from ds_llm.pretrained.loading import attention_kernel, load_model_config, supported_attention

CPU = torch.device("cpu")
SEED = 0  # of random weights and tokens: a proof gives the same figures again


@dataclass
class Subject:
    """A model to be proved. name: what the user calls it; config: its transformers configuration; attention: the kernel
    that it attends with; tokenizer: where the tokenizer of its chats lies, None without one; train_on: "all" answers of
    a chat or the "last"."""

    name: str
    config: PreTrainedConfig
    attention: str
    tokenizer: str | None
    train_on: str = "all"
    _small: PreTrainedConfig | None = field(default=None, repr=False)

    @property
    def small(self) -> PreTrainedConfig:
        """The configuration of the smallest model that runs. `UserError` where there is none."""
        if self._small is None:
            self._small = self._find_small()
        return self._small

    def _find_small(self) -> PreTrainedConfig:
        problem = None
        for small in small_configs(self.config):
            try:
                model = _build(small, self.attention)
                with torch.no_grad():
                    model(input_ids=torch.full((1, 3), 2), use_cache=False)
            except Exception as error:  # numbers of a cut configuration that do not fit together
                problem = problem or first_line(error)
                continue
            return small
        raise UserError(f"no small '{self.config.model_type}' model runs: {problem}")

    def model(self) -> nn.Module:
        """A new small model in fp32 on the CPU; every call gives the same weights."""
        return _build(self.small, self.attention)

    def describe(self) -> str:
        """One line about the small model."""
        model, text = self.model(), self.small.get_text_config()
        size = sum(p.numel() for p in model.parameters())
        return f"{text.num_hidden_layers} layers, {size / 1e6:.2f}M random weights, attention {self.attention}, fp32"


def _build(config: PreTrainedConfig, attention: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return small_model(config, attention, CPU)


def of_model(path: str | os.PathLike) -> Subject:
    """A model by the name that every command takes; none of its weights are read. Raises `UserError` for a bad name."""
    return _subject(str(path), load_model_config(path), "auto", str(path))


def of_run(config: Config) -> Subject:
    """The model of a run: its architecture, attention kernel, tokenizer, and which answers of a chat it trains."""
    model, tokenizer = config.model, config.data.tokenizer or config.model.path
    if model.path is None and config.mode != "pretrain":
        raise ConfigError(f"model.path: mode={config.mode} trains a model; name it: model.path=runs/pretrain")
    found = architecture(config, vocab_size=VOCABULARY)
    name = model.path or model.config or "a decoder from scratch"
    return _subject(name, found, model.attention, tokenizer, config.data.train_on)


def _subject(name: str, config, attention: str, tokenizer: str | None, train_on: str = "all") -> Subject:
    if isinstance(config, QwenBoostConfig):
        raise UserError(f"{name}: is a boosted model; prove its sub-models (launch/convert.py extract writes one)")
    kernel = supported_attention(config, attention, attention_kernel(attention, "fp32"))
    return Subject(name, config, kernel, tokenizer, train_on)


def small_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` words for a small model; token 1 ends and pads, as in the small configurations."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<end>", *(f"w{i}" for i in range(2, size))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<end>", bos_token="<end>", pad_token="<end>"
    )
