"""The whole configuration of a run: its sections, how it is read, and which values must fit each other.

A run is configured by a YAML file and `key=value` overrides (`optim.lr=1e-3`, `model.dim=128`, `zero=3`), merged over
the defaults of the sections (see `ds_llm.config.options`). `load` also checks that values fit each other, and raises
`ConfigError` before anything else is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ds_llm.config import modes, options
from ds_llm.config.mode_sections import DpoConfig, KtoConfig, LoraConfig, RouterConfig, SparseConfig
from ds_llm.config.modes import MODES
from ds_llm.config.options import key
from ds_llm.config.sections import (
    CheckpointConfig,
    DataConfig,
    EmaConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    StabilityConfig,
    TrackingConfig,
    TrainConfig,
)
from ds_llm.errors import ConfigError


@dataclass
class Config:
    mode: str = key("pretrain", "What is trained", choices=tuple(MODES))
    output: str = key("runs/pretrain", "Folder of the run: checkpoints, metrics, report, exported model")
    resume: str = key(
        "auto", "auto: continue from the newest whole checkpoint; never: start anew; or a checkpoint folder"
    )
    zero: int = key(2, "DeepSpeed ZeRO stage", choices=(0, 1, 2, 3))
    deepspeed: Any = key(
        None, 'DeepSpeed JSON file or mapping merged over the generated one; its "auto" values are filled in'
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    kto: KtoConfig = field(default_factory=KtoConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def load(path: str | None = None, overrides: list[str] = ()) -> Config:
    """Merge the defaults, the YAML file at `path` and `key=value` overrides, and check the result.

    Raises `ConfigError` for an unreadable file, an unknown key, a wrong type or an impossible value.
    """
    config = options.load(Config, path, overrides)
    _check_together(config)
    return config


def check(config: Config) -> None:
    """Raise `ConfigError` for the first impossible value or combination of values."""
    options.check(config)
    _check_together(config)


def _check_together(config: Config) -> None:
    m = config.model
    if m.config is not None:
        _check_named_architecture(config)
    elif m.path is None:
        if m.dim % m.n_heads:
            raise ConfigError(f"model.dim: {m.dim} is not divisible by model.n_heads={m.n_heads}")
        if (m.dim // m.n_heads) % 2:
            raise ConfigError(f"model.n_heads: the head size {m.dim // m.n_heads} must be even for rotary embeddings")
        if m.n_kv_heads and m.n_heads % m.n_kv_heads:
            raise ConfigError(f"model.n_kv_heads: {m.n_kv_heads} does not divide model.n_heads={m.n_heads}")
        if m.use_moe and m.num_experts_per_tok > m.n_routed_experts:
            raise ConfigError(
                f"model.num_experts_per_tok: {m.num_experts_per_tok} is more than "
                f"model.n_routed_experts={m.n_routed_experts}"
            )
        if m.use_moe and m.first_dense_layers >= m.n_layers:
            raise ConfigError(
                f"model.first_dense_layers: {m.first_dense_layers} of model.n_layers={m.n_layers} leave no experts"
            )
        for name in ("first_dense_layers", "router_bias_speed"):
            if getattr(m, name) and not m.use_moe:
                raise ConfigError(f"model.{name}: is for experts; set model.use_moe=true, or leave it out")
        if m.full_attention_every and not m.sliding_window:
            raise ConfigError("model.full_attention_every: is for model.sliding_window; set that, or leave it out")
        if m.rope_scaling is not None and not isinstance(m.rope_scaling, dict):
            raise ConfigError("model.rope_scaling: must be a mapping, as {rope_type: yarn, factor: 4}")
        if config.data.seq_len and config.data.seq_len > m.max_seq_len:
            raise ConfigError(f"data.seq_len: {config.data.seq_len} is longer than model.max_seq_len={m.max_seq_len}")
    if len(config.optim.betas) != 2 or not all(0 <= b < 1 for b in config.optim.betas):
        raise ConfigError(f"optim.betas: {config.optim.betas} must be two numbers of at least 0 and less than 1")
    if config.optim.name == "muon" and config.optim.grad_clip:
        raise ConfigError(
            f"optim.grad_clip: {config.optim.grad_clip}: DeepSpeed would clip Muon's update, not the gradient, "
            "and undo its learning rate; Muon bounds its updates itself, set optim.grad_clip=0"
        )
    if config.eval.stride and config.eval.token_length and config.eval.stride > config.eval.token_length:
        raise ConfigError(
            f"eval.stride: {config.eval.stride} is more than eval.token_length={config.eval.token_length}"
        )
    if config.eval.early_stopping and not config.data.val:
        raise ConfigError("eval.early_stopping: needs data.val, the token files to evaluate on")
    if config.data.subset_ratio is not None and not MODES[config.mode].subset:
        takers = modes.names("subset")
        raise ConfigError(f"data.subset_ratio: is for {takers}; {config.mode} trains on all of data.train")
    if config.deepspeed is not None and not isinstance(config.deepspeed, (str, dict)):
        raise ConfigError("deepspeed: must be a JSON file or a mapping")


def _check_named_architecture(config: Config) -> None:
    m = config.model
    if config.mode != "pretrain":
        raise ConfigError(f"model.config: is for pretrain, which trains from scratch; {config.mode} needs model.path")
    if m.path is not None:
        raise ConfigError("model.config: is for training from scratch; leave it out, or model.path")
    for name, default in vars(type(m)()).items():
        if name not in ("config", "freeze", "vocab_size", "max_seq_len", "attention") and getattr(m, name) != default:
            raise ConfigError(f"model.{name}: is for the decoder; model.config={m.config} has its own")
