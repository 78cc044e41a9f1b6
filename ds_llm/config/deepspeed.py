"""The DeepSpeed JSON of a run: generated defaults, the user's own file over them, "auto" values filled in."""

from __future__ import annotations

import copy
import json
from collections.abc import KeysView
from pathlib import Path

from ds_llm.config.run import Config, check
from ds_llm.config.sections import OptimConfig
from ds_llm.errors import ConfigError

# Keys of the configuration's section `parallel`, and where a DeepSpeed JSON has the same
PARALLEL = {
    "expert": "expert_parallel.autoep_size",
    "sequence": "sequence_parallel_size",
    "tensor": "tensor_parallel.autotp_size",
}

# Optimizers by `optim.name`, as a DeepSpeed JSON calls them
TYPES = {"adamw": "AdamW", "adam": "Adam", "muon": "Muon", "lion": "Lion", "adamw8bit": "AdamW8bit"}


class AskedKeys(dict):
    """A mapping that records the keys that somebody looked up, present or not."""

    def __init__(self, values: dict):
        super().__init__(values)
        self.asked: set[str] = set()

    def __getitem__(self, name):
        self.asked.add(name)
        return super().__getitem__(name)

    def __contains__(self, name):
        self.asked.add(name)
        return super().__contains__(name)

    def get(self, name, default=None):
        self.asked.add(name)
        return super().get(name, default)

    def keys(self) -> KeysView:
        return KeysView(self)  # asks this mapping in `name in settings.keys()`, as DeepSpeed writes


def generated(config: Config) -> dict:
    """The JSON of a run without a JSON file of the user."""
    o = config.optim
    zero = {"stage": config.zero}
    if config.zero in (1, 2):
        zero |= {"contiguous_gradients": True, "overlap_comm": False, "reduce_scatter": True}
    if config.zero == 3:
        zero |= {
            "contiguous_gradients": True,
            "overlap_comm": False,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    return {
        "train_micro_batch_size_per_gpu": config.train.batch_size,
        "gradient_accumulation_steps": config.train.accumulation_steps,
        "gradient_clipping": o.grad_clip,
        "zero_optimization": zero,
        "bf16": {"enabled": config.train.dtype == "bf16"},
        "fp16": {"enabled": config.train.dtype == "fp16", "initial_scale_power": 16, "hysteresis": 1},
        "optimizer": {"type": TYPES[o.name], "params": _optimizer_params(o)},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _optimizer_params(o: OptimConfig) -> dict:
    params = {"lr": o.lr, "betas": list(o.betas), "weight_decay": o.weight_decay}
    if o.name != "lion":
        params["eps"] = o.eps
    if o.name in ("adamw", "adam"):
        params["adam_w_mode"] = o.name == "adamw"
    if o.name == "muon":
        params |= {"muon_lr": o.muon_lr, "momentum": o.momentum}
    return params


def read(source: str | dict | None) -> dict:
    """The user's JSON as a mapping, empty when there is none. Raises `ConfigError` with the line of an error."""
    if source is None:
        return {}
    if isinstance(source, dict):
        return copy.deepcopy(source)
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"deepspeed: {path}: no such file")
    try:
        loaded = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"deepspeed: {path}: not JSON ({error})") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"deepspeed: {path}: must be a JSON object")
    return loaded


def adopt(config: Config, world_size: int) -> list[str]:
    """Copy values that the user's JSON fixes into `config`, so that both agree. Returns a line per changed key.

    Explicit numbers of the JSON win over the run's keys; "auto" and absent keys take the run's. `train_batch_size` is
    divided by the world size and the micro-batch.
    """
    user, changed = read(config.deepspeed), []

    def take(section, name: str, key: str, value) -> None:
        if value in (None, "auto"):
            return
        kind = type(getattr(section, name))
        try:
            value = kind(value)
        except (TypeError, ValueError):
            raise ConfigError(f"deepspeed: {key}: {value!r} is not {kind.__name__}") from None
        if getattr(section, name) != value:
            changed.append(f"{key}={value} of the DeepSpeed JSON replaces {name}={getattr(section, name)}")
            setattr(section, name, value)

    optimizer = user.get("optimizer", {})
    sections = {name: user.get(name, {}) for name in ("zero_optimization", "bf16", "fp16", "optimizer")}
    if isinstance(optimizer, dict):
        sections["optimizer.params"] = optimizer.get("params", {})
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(f"deepspeed: {name}: {section!r} must be a JSON object")
    zero = sections["zero_optimization"]
    take(config, "zero", "zero_optimization.stage", zero.get("stage"))
    for name, place in PARALLEL.items():
        section, _, leaf = place.rpartition(".")
        where = user.get(section, {}) if section else user
        if not isinstance(where, dict):
            raise ConfigError(f"deepspeed: {section}: {where!r} must be a JSON object")
        if extra := sorted(where.keys() - {leaf, "enabled"}) if section else []:
            raise ConfigError(f"deepspeed: {section}.{extra[0]}: only {leaf} is used; the rest follows from the model")
        if where.get("enabled", True) is not False:
            take(config.parallel, name, place, where.get(leaf) or None)  # DeepSpeed's 0 is off
    if config.zero not in (0, 1, 2, 3):
        raise ConfigError(f"deepspeed: zero_optimization.stage: {config.zero} is not one of 0, 1, 2, 3")
    take(config.train, "batch_size", "train_micro_batch_size_per_gpu", user.get("train_micro_batch_size_per_gpu"))
    take(config.train, "accumulation_steps", "gradient_accumulation_steps", user.get("gradient_accumulation_steps"))
    total = user.get("train_batch_size", "auto")
    if total != "auto":
        batches = world_size // (config.parallel.sequence * config.parallel.tensor)
        part = config.train.batch_size * max(batches, 1)
        units = "processes" if batches == world_size else "groups of processes"
        steps = user.get("gradient_accumulation_steps", "auto")
        if type(total) is not int or total < 1:
            raise ConfigError(f"deepspeed: train_batch_size: {total!r} is not a positive whole number")
        if total % part or (steps != "auto" and total != part * steps):
            raise ConfigError(
                f"deepspeed: train_batch_size: {total} is not {config.train.batch_size} samples x {batches} {units} x "
                'a whole number of accumulation steps; set it to "auto" or change train.batch_size'
            )
        take(config.train, "accumulation_steps", "train_batch_size", total // part)
    take(config.optim, "grad_clip", "gradient_clipping", user.get("gradient_clipping"))
    on = [name for name in ("bf16", "fp16") if user.get(name, {}).get("enabled") is True]
    if len(on) == 2:
        raise ConfigError("deepspeed: bf16 and fp16 are both enabled")
    if on:
        take(config.train, "dtype", f"{on[0]}.enabled", on[0])
    elif user.get(config.train.dtype, {}).get("enabled") is False:
        take(config.train, "dtype", f"{config.train.dtype}.enabled=false", "fp32")
    params = sections["optimizer.params"]
    if str(optimizer.get("type")).lower() in TYPES:
        take(config.optim, "name", "optimizer.type", optimizer["type"].lower())
    for name in ("lr", "muon_lr", "momentum", "eps", "weight_decay"):
        take(config.optim, name, f"optimizer.params.{name}", params.get(name))
    if params.get("betas", "auto") != "auto":
        take(config.optim, "betas", "optimizer.params.betas", params["betas"])
    check(config)
    return changed


def dtype_key(config: Config) -> str:
    """The key that sets the dtype: `train.dtype`, or the one of the user's JSON from which `adopt` took it."""
    dtype = config.train.dtype
    in_json = read(config.deepspeed).get(dtype, {}).get("enabled") is True
    return f"deepspeed: {dtype}.enabled" if in_json else f"train.dtype={dtype}"


def build(config: Config, world_size: int) -> dict:
    """The whole JSON for DeepSpeed. Call `adopt` on `config` first."""
    user = read(config.deepspeed)
    user.pop("train_batch_size", None)  # its parts are set below, and DeepSpeed multiplies them itself
    for place in PARALLEL.values():
        user.pop(place.partition(".")[0], None)  # the engine divides the model itself
    base = generated(config)
    if has_auto(user.get("scheduler")):
        user.pop("scheduler")  # left to the run: optim.schedule drives the learning rate
    if user.get("optimizer", {}).get("type", "auto") not in ("auto", "Adam", "AdamW"):
        # optimizers have different options: another than Adam gets those the file asks for
        wanted = {"lr", *user["optimizer"].get("params", {})}
        base["optimizer"]["params"] = {k: v for k, v in base["optimizer"]["params"].items() if k in wanted}
    settings = _overlay(base, user, "")
    for section in ("bf16", "fp16"):
        settings[section]["enabled"] = config.train.dtype == section
        if not settings[section]["enabled"]:
            settings[section] = {"enabled": False}
    offload = settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    kind = settings["optimizer"]["type"]
    if kind in ("Muon", "AdamW8bit"):
        settings["zero_allow_untested_optimizer"] = True
        settings["zero_force_ds_cpu_optimizer"] = False
    if kind == "Muon" and config.zero == 3:  # DeepSpeed's orthogonalises gradients that are reduced whole
        settings["zero_optimization"].setdefault("reduce_scatter", False)
    if kind in ("Adam", "AdamW") and not offload:
        # torch's fused Adam is as fast as DeepSpeed's and needs no compiler on the user's machine
        settings["optimizer"]["params"].setdefault("torch_adam", True)
        settings["optimizer"]["params"].setdefault("fused", True)
        if settings["optimizer"]["params"]["torch_adam"]:
            settings["zero_allow_untested_optimizer"] = True
        else:
            settings["optimizer"]["params"].pop("fused")
    if config.train.accumulation_steps > 1 and config.train.dtype == "bf16" and config.zero > 0:
        # summing many micro-batches in bf16 loses the small ones
        settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    return settings


def has_auto(value) -> bool:
    """Whether a value of the JSON, at any depth, is left to the run."""
    if isinstance(value, dict):
        return any(has_auto(v) for v in value.values())
    return value == "auto"


def _overlay(base: dict, user: dict, prefix: str) -> dict:
    merged = copy.deepcopy(base)
    for name, value in user.items():
        if value == "auto":
            if name not in merged:
                if prefix.startswith("zero_optimization"):
                    continue  # DeepSpeed's own default
                raise ConfigError(f'deepspeed: {prefix}{name}: "auto" is not known for this key; write a value')
        elif isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _overlay(merged[name], value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            merged[name] = _overlay({}, value, f"{prefix}{name}.")
        else:
            merged[name] = value
    return merged
