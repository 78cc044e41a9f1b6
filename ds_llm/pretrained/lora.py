"""Trainable low-rank adapters (peft), and parts of a model that keep their weights.

LoRA: Hu et al. 2021 (arXiv:2106.09685); rsLoRA scales by alpha / sqrt(r): Kalajdzievski 2023 (arXiv:2312.03732); DoRA
trains the norms of the weights' rows besides: Liu et al. 2024 (arXiv:2402.09353). QLoRA holds the frozen weights in 4
bits: Dettmers et al. 2023 (arXiv:2305.14314).
"""

from __future__ import annotations

import difflib
from pathlib import Path

import torch
from torch import nn

from ds_llm.compat.peft import name_base
from ds_llm.config.mode_sections import LoraConfig
from ds_llm.config.modes import MODES
from ds_llm.config.run import Config
from ds_llm.errors import ConfigError, UserError, first_line
from ds_llm.pretrained.fingerprint import identity
from ds_llm.pretrained.source import base_name
from ds_llm.pretrained.trained import trained_names


def check(config: Config) -> dict[str, str]:
    """Raise `ConfigError` or `UserError` for adapters and frozen parts that cannot work, before the model is loaded.

    Returns the identity of the base model: checkpoints do not hold frozen weights, so a continued run must find the
    same ones.
    """
    lora = config.lora
    if not lora.enabled and lora.quantize != "none":
        raise ConfigError(f"lora.quantize: {lora.quantize} weights cannot be trained; set lora.enabled=true")
    if config.model.freeze:
        _check_frozen(config)
    if not lora.enabled:
        return {"base_model": identity(config.model.path)} if config.model.freeze else {}

    from ds_llm.pretrained.loading import need

    need("peft", what="lora.enabled")
    if lora.quantize != "none":
        need("bitsandbytes", "accelerate", what=f"lora.quantize={lora.quantize}")
    if config.model.path is None:
        raise ConfigError("lora.enabled: adapters need a trained model; name it, for example model.path=runs/pretrain")
    model = _outline(config.model.path)
    modules, parameters = resolve_targets(model, lora.targets, config.model.freeze)
    for part in getattr(model, "sub_models", [model]):
        head = next(name for name, module in model.named_modules() if module is part.get_output_embeddings())
        tied = part.config.get_text_config().tie_word_embeddings
        if tied and modules != "all-linear" and any(_ends(head, target) for target in modules):
            raise ConfigError(
                f"lora.targets: {head} shares its weight with the token embedding; an adapter of it could not be merged"
            )
    if parameters and (lora.dora or lora.dropout):
        raise ConfigError(
            f"lora.targets: {parameters[0]} is a fused expert tensor; peft adapts it without DoRA and dropout only: "
            "set lora.dora=false lora.dropout=0"
        )
    return {"base_model": identity(config.model.path)}


def _outline(path: str) -> nn.Module:
    """The model at `path` on the meta device, without its weights."""
    from transformers import AutoModelForCausalLM

    from ds_llm.pretrained.loading import load_model_config

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_model_config(path))


def _check_frozen(config: Config) -> None:
    freeze = config.model.freeze
    if config.model.path is None:
        raise ConfigError("model.freeze: names parts of a trained model; set model.path")
    if not MODES[config.mode].freezes:
        raise ConfigError(f"model.freeze: {config.mode} trains the whole model; leave it out")
    names = [name for name, _ in _outline(config.model.path).named_parameters(remove_duplicate=False)]
    for start in freeze:
        if not any(is_in_parts(name, [start]) for name in names):
            known = {".".join(name.split(".")[: start.count(".") + 1]) for name in names}
            close = difflib.get_close_matches(start, known, n=1) or sorted(known)[:1]
            raise ConfigError(f"model.freeze: no parameter's name begins with '{start}'; did you mean '{close[0]}'?")
    if all(is_in_parts(name, freeze) for name in names):
        raise ConfigError("model.freeze: leaves nothing to train")


def resolve_targets(model: nn.Module, targets: list[str], freeze: list[str] = ()) -> tuple[list[str] | str, list[str]]:
    """Resolve `lora.targets` to (names of linear layers, or "all-linear"; names of fused expert parameters).

    A target is the end of a layer's name (`q_proj`, `layers.0.mlp.up_proj`) or of a 3-D parameter's name
    (`experts.down_proj`). Layers whose names begin with one of `freeze` are left out. Raises `ConfigError` for a target
    that the model does not have.
    """
    trained = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and not is_in_parts(n, freeze)]
    layers = [name for name, _ in trained]
    stacks = [name for name, p in model.named_parameters() if p.dim() == 3 and not is_in_parts(name, freeze)]
    parts = getattr(model, "sub_models", [model])
    if list(targets) == ["all-linear"]:
        if not freeze and len(parts) == 1:
            return "all-linear", []
        # peft leaves out one output head, and no other layers
        heads = [part.get_output_embeddings() for part in parts]
        return [name for name, module in trained if not any(module is head for head in heads)], []
    modules, parameters = [], []
    for target in targets:
        if found := [name for name in layers if _ends(name, target)]:
            modules += found if freeze else [target]
        elif found := [name for name in stacks if _ends(name, target)]:
            parameters += found if freeze else [target]
        else:
            known = sorted({name.rsplit(".", 1)[-1] for name in layers})
            known += sorted({".".join(name.split(".")[-2:]) for name in stacks})
            close = difflib.get_close_matches(target, [*known, "all-linear"], n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(known)}"
            raise ConfigError(f"lora.targets: no linear layer of the model is called '{target}'; {hint}")
    return modules, parameters


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def is_in_parts(name: str, starts: list[str]) -> bool:
    """Whether a parameter or module belongs to one of the parts that `starts` name, as `model.freeze` does."""
    return any(name == start or name.startswith(f"{start}.") for start in starts)


def add_adapter(
    model: nn.Module, lora: LoraConfig, base: str, freeze: list[str] = (), embeddings: bool = False
) -> nn.Module:
    """A peft model in which only new adapters are trainable, with none in the parts that `freeze` names.

    base: name of the model that the adapters belong to. embeddings: copies of the input and the output embedding are
    trained whole and saved with the adapters, as added tokens need it.
    """
    import peft

    modules, parameters = resolve_targets(model, lora.targets, freeze)
    settings = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        init_lora_weights=True if lora.init == "default" else lora.init,
        **(_trained_embeddings(model) if embeddings else {}),
    )
    settings.base_model_name_or_path = base_name(base)
    try:
        wrapped = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"lora: peft cannot adapt this model: {first_line(error)}") from None
    name_base(wrapped, base_name(base))
    return wrapped


def _trained_embeddings(model: nn.Module) -> dict:
    """peft's options for training both embeddings whole; tied ones stay tied."""
    ends = [model.get_input_embeddings()]
    tied = model.config.get_text_config().tie_word_embeddings
    ends += [] if tied else [model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    return {"modules_to_save": names, "ensure_weight_tying": tied}


def save_adapter(model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a peft folder: adapter_model.safetensors from the gathered `weights`, and adapter_config.json.

    Raises `UserError` where a weight is missing or empty, as in a sharded model that was not gathered.
    """
    trained_names(model, weights, f"{folder}: the adapter")
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # peft asks for tied ones by both names
        if first.setdefault(id(parameter), name) in weights:
            weights.setdefault(name, weights[first[id(parameter)]])
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty form of a model card
