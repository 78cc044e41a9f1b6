"""The keys of the section `tracking` of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_llm.config.options import key


@dataclass
class WandbConfig:
    enabled: bool = key(False, "Log to Weights & Biases")
    project: str = key("ds_llm", "Project name")
    run_name: str | None = key(None, "Run name; none: the output folder's name")
    mode: str = key("online", "offline writes to disk for `wandb sync`", choices=("online", "offline", "disabled"))
    log_model: bool = key(False, "Upload the exported model as an artifact")
    log_code: bool = key(False, "Upload the source and the resolved configuration as an artifact")
    log_every: int = key(1, "Steps between points sent", at_least=1)
    watch: str = key(
        "none", "Histograms of the parameters and gradients", choices=("none", "gradients", "parameters", "all")
    )
    watch_every: int = key(100, "Steps between histograms", at_least=1)


@dataclass
class TrackingConfig:
    log_every: int = key(10, "Steps between progress lines on a non-terminal", at_least=1)
    tensorboard: bool = key(True, "Write TensorBoard event files")
    report: bool = key(True, "Write report.html at every evaluation and at the end")
    wandb: WandbConfig = field(default_factory=WandbConfig)
