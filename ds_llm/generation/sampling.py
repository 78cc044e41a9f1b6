"""Options of sampling: their bounds and their command-line form. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass

from ds_llm.config.options import check_value, key
from ds_llm.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """Options of one generation. They act in the order repetition penalty, n-grams, temperature, top-k, top-p, min-p.

    Raises `ConfigError` for a value out of bounds, or options that contradict each other.
    """

    max_new_tokens: int = key(128, "longest answer in tokens", at_least=1)
    min_new_tokens: int = key(0, "the end-of-text token is not chosen before so many tokens", at_least=0)
    temperature: float = key(0.8, "divides the logits; 0 is greedy: always the likeliest token", at_least=0)
    top_k: int = key(0, "choose among so many likeliest tokens; 0: all", at_least=0)
    top_p: float = key(
        0.95, "choose among the likeliest tokens that together have this probability", at_least=1e-6, at_most=1
    )
    min_p: float = key(0.0, "drop tokens less likely than this share of the likeliest one", at_least=0, at_most=1)
    repetition_penalty: float = key(1.0, "makes tokens that occurred less likely when above 1 (CTRL)", at_least=1e-3)
    no_repeat_ngram_size: int = key(0, "no sequence of so many tokens occurs twice; 0: off", at_least=0)
    stop: tuple[str, ...] = key((), "end before this text; may be given several times")
    num_beams: int = key(1, "beam search with so many beams", at_least=1)
    num_return_sequences: int = key(1, "answers per prompt", at_least=1)
    use_cache: bool = key(True, "keep the keys and values of past tokens")
    seed: int | None = key(None, "makes sampling reproducible on one machine and batch size", at_least=0)

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        for field in dataclasses.fields(self):
            if field.metadata["at_least"] is not None:
                self._check_number(field, getattr(self, field.name))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError("stop: must be text that is not empty")
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens: {self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}"
            )
        several = self.num_return_sequences
        if several > 1 and self.temperature == 0 and several > self.num_beams:
            raise ConfigError(
                f"num_return_sequences: {several} greedy answers would be the same; set temperature above 0 or "
                f"num_beams to at least {several}"
            )

    def _check_number(self, field: dataclasses.Field, value) -> None:
        if value is None and field.default is None:
            return
        name, kind = field.name, float if isinstance(field.default, float) else int
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not math.isfinite(value):
            raise ConfigError(f"{name}: {value!r} is not {'a number' if kind is float else 'a whole number'}")
        check_value(name, value, field)
        object.__setattr__(self, name, kind(value))  # transformers refuses a whole number where a fraction could be


def one_answer(params: SamplingParams | None, options: dict, streams: bool = False) -> SamplingParams:
    """`params` (or the defaults) changed by `options`, for one answer per prompt; `ConfigError` where it is not."""
    params = dataclasses.replace(params or SamplingParams(), **options)
    if params.num_return_sequences != 1:
        raise ConfigError("num_return_sequences: must be 1 here; Generator.complete and --batch-file give several")
    if streams and params.num_beams != 1:
        raise ConfigError("num_beams: must be 1 to stream: beam search has no text before its end")
    return params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One command-line option per field of `SamplingParams`, and `--greedy` for a temperature of 0."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    for field in dataclasses.fields(SamplingParams):
        flag, help = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if field.name == "stop":
            group.add_argument(flag, action="append", default=[], metavar="TEXT", help=help)
        elif isinstance(field.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=help)
        else:
            kind = float if isinstance(field.default, float) else int
            shown = "" if field.default is None else f" ({field.default})"
            group.add_argument(flag, type=kind, default=field.default, metavar="N", help=help + shown)


def from_arguments(arguments: argparse.Namespace) -> SamplingParams:
    """The options that `add_arguments` parsed."""
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(SamplingParams)}
    if arguments.greedy:
        values["temperature"] = 0.0
    return SamplingParams(**values)
