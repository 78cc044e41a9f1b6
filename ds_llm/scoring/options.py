"""Options of a scoring run: `ScoreConfig`, read like a run's configuration from YAML and `score.key=value`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_llm.config import options
from ds_llm.config.options import key
from ds_llm.config.sections import DTYPES
from ds_llm.errors import ConfigError

TOKENS = ("answers", "last", "all")
FORMATS = ("auto", "messages", "prompt_completion", "alpaca", "text")
TEMPLATES = ("auto", "none")
TRUNCATE = ("right", "left", "error")
PACKED = (".gz", ".zst", ".parquet")  # endings of inputs that an output does not have


@dataclass
class ScoreConfig:
    model: str = key("", "Folder, hub name, run, checkpoint, adapter or .gguf file of the model that scores")
    data: list[str] = key([], "JSONL, JSON, text or Parquet files, folders or patterns, or data sets of the hub")
    out: str = key("", "Output file, JSON lines; OUT.d beside it holds what a rerun needs, and the statistics")
    metric: list[str] = key(["entropy"], "What to measure, all in one pass; see docs/scoring.md")
    field: list[str] = key([], "Names of the metrics in the output, one for each; empty: the metrics' own")
    tokens: str = key(
        "answers",
        "Tokens that count in conversations: every answer's, those of the last answer, or all; in texts it is all",
        choices=TOKENS,
    )
    format: str = key("auto", "Format of the rows; auto: what most of the first rows have", choices=FORMATS)
    template: str = key(
        "auto",
        "auto: the tokenizer's chat template where it has one; none: prompt and completion one after the other",
        choices=TEMPLATES,
    )
    max_length: int | None = key(None, "Tokens of a row at most; none: the model's positions", at_least=2)
    truncate: str = key(
        "right", "Longer rows: keep their beginning, keep their end (left), or refuse them (error)", choices=TRUNCATE
    )
    tokens_per_batch: Any = key("auto", "Tokens of a forward pass with its padding; auto: the most that fits")
    only_idx: bool = key(False, "Write only idx (number of the row, from 0) and the fields, not the input row")
    per_token: bool = key(False, "Also write the values of every scored token, to OUT.d/tokens.parquet")
    report: bool = key(True, "Write OUT.d/report.html, a page about the scores")
    dtype: str = key("auto", "Type to compute in; auto: as saved on a GPU, fp32 on a CPU", choices=("auto", *DTYPES))
    zero3: bool = key(False, "Shard the weights over all ranks (ZeRO-3 inference)")
    offload: bool = key(False, "With zero3: keep the weights in the CPUs' memory")
    tensor_parallel: int = key(1, "Ranks that share each layer (DeepSpeed AutoTP)", at_least=1)
    hang_timeout: float = key(
        1800.0,
        "Seconds in which a batch must be scored; else the run is ended with what every rank was doing and its stack; "
        "0: no limit",
        at_least=0,
    )
    lost_timeout: float = key(
        120.0, "Seconds without a sign of life until a rank counts as lost, which ends the run", above=0
    )
    overwrite: bool = key(False, "Start over where an output or an unfinished run of other options is")


@dataclass
class Options:
    score: ScoreConfig = field(default_factory=ScoreConfig)


def load(path: str | None = None, overrides: list[str] = (), flags: dict[str, Any] | None = None) -> ScoreConfig:
    """Defaults, the section `score` of a YAML file, `score.key=value` overrides, `flags` by bare key, in this order.

    Raises `ConfigError` for unknown keys, wrong types, impossible and missing values.
    """
    found = options.load(Options, path, overrides)
    for name, value in (flags or {}).items():
        if not hasattr(found.score, name):
            raise ConfigError(f"'{name}' is no option of scoring; known are {', '.join(vars(found.score))}")
        setattr(found.score, name, value)
    options.check(found)
    check(found.score)
    return found.score


def check(config: ScoreConfig) -> None:
    """Raise `ConfigError` for missing options and impossible combinations. Opens no file."""
    for name, flag in (("model", "--model"), ("data", "--data"), ("out", "--out")):
        if not getattr(config, name):
            raise ConfigError(f"score.{name}: not given; use {flag}")
    budget = config.tokens_per_batch
    if budget != "auto" and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise ConfigError(f"score.tokens_per_batch: {budget!r} must be auto or a whole number of at least 1")
    if config.field and len(config.field) != len(config.metric):
        raise ConfigError(
            f"score.field: {len(config.field)} names for {len(config.metric)} metrics; give one for each, in order"
        )
    if len(set(config.field)) < len(config.field) or not all(config.field):
        raise ConfigError("score.field: names must differ and not be empty")
    if config.out.endswith(PACKED) or Path(config.out).is_dir():
        raise ConfigError(f"score.out: {config.out}: name a file for JSON lines, for example scores.jsonl")
    if config.offload and not config.zero3:
        raise ConfigError("score.offload: parameters are offloaded by ZeRO-3; set score.zero3=true too")
    if config.zero3 and config.tensor_parallel > 1:
        raise ConfigError("score.tensor_parallel: not together with score.zero3; choose one")


def output_field(column: str, metrics: list[str], fields: list[str]) -> str:
    """Name in the output of a metric's column: its field, or with a field of its own name `field_column`."""
    if not fields:
        return column
    for metric, name in zip(metrics, fields, strict=True):
        if column == metric:
            return name
    owners = [(m, f) for m, f in zip(metrics, fields, strict=True) if column.startswith(f"{m}_")]
    if not owners:
        return column
    metric, name = max(owners, key=lambda pair: len(pair[0]))
    return name + column[len(metric) :]
