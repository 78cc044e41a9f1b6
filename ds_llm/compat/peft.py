"""peft 0.19 to 0.21: how a wrapped model is told from another, without importing peft.

All else that we use of peft is its public interface: `LoraConfig`, `get_peft_model`, `PeftModel`, `PeftConfig`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def is_adapter(model: nn.Module) -> bool:
    """Whether `model` is a peft model, of which only adapters are trained and saved."""
    return isinstance(getattr(model, "peft_config", None), dict) and hasattr(model, "get_base_model")


def without_wrapper(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft model, with its adapters active; any other model itself."""
    return model.get_base_model() if is_adapter(model) else model


def learns_prompts(model: nn.Module) -> bool:
    """Whether an adapter of a peft model is a learned prompt, which changes the input and no weights."""
    return any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values())


def name_base(model: nn.Module, name: str | None) -> None:
    """Set the name of the base model that is saved with the adapters of a peft model."""
    model.peft_config["default"].base_model_name_or_path = name


def adapted_layers(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """The layers of a peft model that hold adapters, each with whether an adapter changes the layer's bias too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in list(model.modules()):
        if isinstance(module, BaseTunerLayer):
            yield module, any(getattr(module, "lora_bias", {}).values())
