"""What our transformers models are built with: the base class, and the key-value cache under both of its names.

transformers 5.24 renamed the argument and the output `past_key_values` to `cache`. Our forward passes say `cache`;
callers may use either name with every tested version.
"""

# no `from __future__ import annotations` here: dataclasses read the annotations at run time
import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

from transformers import PreTrainedModel

from ds_llm.compat.transformers import Cache, CausalLMOutputWithPast, OutputRecorder

OLD_NAME = "past_key_values"
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else OLD_NAME


def cache_argument(cache: Cache | None) -> dict[str, Cache | None]:
    """The keyword argument that gives a cache to a model or an output of the installed transformers."""
    return {CACHE: cache}


def takes_cache(forward: Callable) -> Callable:
    """Let a forward pass that has an argument `cache` also take it as `past_key_values`.

    Raises ValueError where both are given.
    """

    @functools.wraps(forward)
    def either_name(*args, **kwargs):
        if OLD_NAME in kwargs:
            given = kwargs.pop(OLD_NAME)
            if given is not None and kwargs.get("cache") is not None:
                raise ValueError("give the cache as `cache` or as `past_key_values`, not as both")
            if given is not None:
                kwargs["cache"] = given
        return forward(*args, **kwargs)

    return either_name


def model_output(cls: type) -> type:
    """Make a dataclass of an output with a field `cache`, which has the name that the installed transformers reads."""
    if CACHE != "cache" and "cache" in cls.__annotations__:
        cls.__annotations__ = {CACHE if name == "cache" else name: kind for name, kind in cls.__annotations__.items()}
        setattr(cls, CACHE, cls.cache)
        cls.cache = property(lambda self: self.get(CACHE))
    return dataclass(cls)


class CausalModel(PreTrainedModel):
    """Base of our models: any attention kernel, gradient checkpointing, no cache in pipelines over devices.

    A subclass may give `tied`, {name of a weight: name of the weight it shares}, and `records`, {name of an output:
    (class of the layers that give it, its position in what they return)}.
    """

    supports_gradient_checkpointing = True
    _skip_keys_device_placement = (CACHE,)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init_subclass__(cls, tied: dict | None = None, records: dict | None = None, **kwargs):
        if tied is not None:
            cls._tied_weights_keys = tied
        if records is not None:
            cls._can_record_outputs = {name: OutputRecorder(kind, index=at) for name, (kind, at) in records.items()}
        super().__init_subclass__(**kwargs)
