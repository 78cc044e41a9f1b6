"""Checks of DeepSpeed's dtype and JSON before a model is built."""

from __future__ import annotations

import difflib

import deepspeed
import torch.distributed as dist
from pydantic import ValidationError

from ds_llm.compat.deepspeed import AsyncIOBuilder, DeepSpeedConfigError
from ds_llm.config.deepspeed import AskedKeys
from ds_llm.config.deepspeed import build as build_deepspeed_config
from ds_llm.config.run import Config
from ds_llm.engine import nvme
from ds_llm.engine.processes import device
from ds_llm.errors import ConfigError, first_line


def check_dtype(dtype: str, key: str) -> None:
    """Raise `ConfigError` that names `key` for a dtype (fp32, bf16, fp16) in which DeepSpeed cannot train here."""
    if dtype == "fp16" and not deepspeed.get_accelerator().is_fp16_supported():
        kind = "CPU" if device().type == "cpu" else "device"
        raise ConfigError(f"{key}: DeepSpeed finds no fp16 arithmetic on this {kind}; use bf16 or fp32")


def check_settings(config: Config) -> None:
    """Let DeepSpeed parse the run's JSON.

    Raises `ConfigError` for values that DeepSpeed refuses and for unknown top-level keys, which it would ignore.
    """
    settings = AskedKeys(build_deepspeed_config(config, dist.get_world_size()))
    try:
        deepspeed.DeepSpeedConfig(settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"deepspeed: {error.title}: {key}: {first['msg']}") from None
    except (DeepSpeedConfigError, ValueError, AssertionError, TypeError, AttributeError) as error:
        raise ConfigError(f"deepspeed: {first_line(error)}") from None
    for name in settings:
        if name not in settings.asked:
            near = difflib.get_close_matches(name, settings.asked, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"deepspeed: {name}: DeepSpeed has no such key{hint}")
    nvme.check(settings, AsyncIOBuilder().is_compatible)
