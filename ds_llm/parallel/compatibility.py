"""Which features of a run can be combined: one table of those that cannot, each with its reason.

`tests/multirank/test_parallel.py` trains every pair that is not in the table.
"""

from __future__ import annotations

from ds_llm.config import deepspeed as deepspeed_config
from ds_llm.config.modes import MODES
from ds_llm.config.run import Config
from ds_llm.errors import ConfigError

# What a feature is called in an error, so what to change to be without it
KEYS = {
    "expert": "parallel.expert={0.parallel.expert}",
    "sequence": "parallel.sequence={0.parallel.sequence}",
    "tensor": "parallel.tensor={0.parallel.tensor}",
    "zero0": "zero=0",
    "zero1": "zero=1",
    "zero2": "zero=2",
    "zero3": "zero=3",
    "fp16": "train.dtype=fp16",
    **{name: f"mode={name}" for name, mode in MODES.items() if mode.refuses},
    "experts": "model.use_moe=true",
    "lora": "lora.enabled=true",
    "nf4": "lora.quantize=nf4",
    "freeze": "model.freeze",
    "ema": "ema.enabled=true",
    "muon": "optim.name=muon",
    "adamw8bit": "optim.name=adamw8bit",
    "generation": "eval.generation_metrics",
    "offload_optimizer": "zero_optimization.offload_optimizer of the DeepSpeed JSON",
    "offload_param": "zero_optimization.offload_param of the DeepSpeed JSON",
    "nvme": "offloading the optimizer to NVMe",
    "hpz": "zero_optimization.zero_hpz_partition_size of the DeepSpeed JSON",
    "quantized_gradients": "zero_optimization.zero_quantized_gradients of the DeepSpeed JSON",
}

# (features that are in a run together, why they must not be)
REFUSED = (
    ("tensor", "sequence", "ranks that hold slices of layers need the same tokens"),
    ("tensor", "expert", "DeepSpeed folds the two only with its own routers"),
    ("tensor", "experts", "DeepSpeed cannot split fused experts; use parallel.expert"),
    ("tensor", "lora", "DeepSpeed does not find the layers inside adapters"),
    ("tensor", "freeze", "the trained part alone is saved, and not put together from slices"),
    ("tensor", "generation", "answers are generated on every rank for itself"),
    ("expert", "lora", "adapters leave the experts frozen, and DeepSpeed shares only trained ones; use zero=3"),
    ("expert", "freeze", "DeepSpeed shares only trained experts; use zero=3"),
    ("expert", "hpz", "DeepSpeed has no secondary copies of experts"),
    ("expert", "quantized_gradients", "DeepSpeed does not quantise gradients of experts"),
    ("ema", "nvme", "the average is taken of weights in memory; use CPU offload"),
    ("muon", "tensor", "a slice of a matrix has other orthogonal factors than the whole"),
    ("muon", "expert", "DeepSpeed's Muon does not train experts that ranks share"),
    ("muon", "sparse", "pruned matrices are vectors of their kept values"),
    ("muon", "nvme", "its momentum is not written to the disk; use CPU offload"),
    ("adamw8bit", "nvme", "8-bit states are not written to the disk; use CPU offload"),
    ("nf4", "zero3", "4-bit weights cannot be sharded; use zero=2"),
    *((feature, name, reason) for name, mode in MODES.items() for feature, reason in mode.refuses.items()),
)


def features(config: Config) -> set[str]:
    """Those of `KEYS` that a run uses. Call `deepspeed_config.adopt` on `config` first."""
    zero = deepspeed_config.read(config.deepspeed).get("zero_optimization", {})
    devices = {name: (zero.get(f"offload_{name}") or {}).get("device", "none") for name in ("optimizer", "param")}
    parallel = config.parallel
    has = {
        f"zero{config.zero}": True,
        config.mode: True,
        config.train.dtype: True,
        config.optim.name: True,
        "expert": parallel.expert > 1,
        "sequence": parallel.sequence > 1,
        "tensor": parallel.tensor > 1,
        "experts": config.model.path is None and config.model.use_moe,
        "lora": config.lora.enabled,
        "nf4": config.lora.enabled and config.lora.quantize == "nf4",
        "freeze": bool(config.model.freeze),
        "ema": config.ema.enabled,
        "generation": bool(config.eval.generation_metrics),
        "offload_optimizer": devices["optimizer"] not in ("none", "auto"),
        "offload_param": devices["param"] not in ("none", "auto"),
        "nvme": devices["optimizer"] == "nvme",
        "hpz": zero.get("zero_hpz_partition_size", 1) not in (0, 1, "auto"),
        "quantized_gradients": zero.get("zero_quantized_gradients") is True,
    }
    return {name for name, present in has.items() if present and name in KEYS}


def check(config: Config, world_size: int) -> None:
    """Raise `ConfigError` for features that cannot be combined, and groups that `world_size` processes cannot form."""
    found = features(config)
    for first, second, reason in REFUSED:
        if first in found and second in found:
            names = [KEYS[name].format(config) for name in (first, second)]
            raise ConfigError(f"{names[0]}: not possible with {names[1]}: {reason}")
    parallel = config.parallel
    for name in ("expert", "sequence", "tensor"):
        if world_size % getattr(parallel, name):
            raise ConfigError(f"parallel.{name}: {getattr(parallel, name)} does not divide the {world_size} processes")


def markdown() -> str:
    """The table, as in docs/parallelism.md."""
    lines = ["| not together | | because |", "| --- | --- | --- |"]
    for first, second, reason in REFUSED:
        names = [KEYS[name].format(_Shown()) for name in (first, second)]
        lines.append(f"| `{names[0]}` | `{names[1]}` | {reason} |")
    return "\n".join(lines)


class _Shown:
    """Stands for a configuration whose values are not to be shown."""

    def __getattr__(self, name: str):
        return self

    def __format__(self, spec: str) -> str:
        return "N"


if __name__ == "__main__":
    print(markdown())
