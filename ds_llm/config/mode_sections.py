"""The sections of a run's configuration that only some modes read: adapters, and one section per mode that has keys."""

from __future__ import annotations

from dataclasses import dataclass

from ds_llm.config.options import key


@dataclass
class LoraConfig:
    enabled: bool = key(False, "Train low-rank adapters and keep the model's own weights as they are")
    r: int = key(16, "Rank", at_least=1)
    alpha: float = key(32.0, "The adapters' product is scaled by alpha / r (rsLoRA: alpha / sqrt(r))", above=0)
    dropout: float = key(0.0, "Dropout probability on the adapters' input", at_least=0, below=1)
    targets: list[str] = key(
        ["all-linear"],
        "Layers that get an adapter: all-linear (not the output head, not expert stacks) or ends of names, as [q_proj, "
        "v_proj]; experts.gate_up_proj names an expert stack",
    )
    dora: bool = key(False, "DoRA: learn the norms of the weights' rows besides")
    rslora: bool = key(False, "rsLoRA: scale by alpha / sqrt(r)")
    init: str = key("default", "Initial weights of the first factor; the second is 0", choices=("default", "gaussian"))
    quantize: str = key(
        "none",
        "QLoRA: hold the frozen linear layers in 4 bits (NormalFloat), by bitsandbytes; not with zero=3",
        choices=("none", "nf4"),
    )


@dataclass
class DpoConfig:
    loss: str = key("sigmoid", "Preference loss", choices=("sigmoid", "hinge", "ipo", "simpo", "orpo"))
    beta: float = key(
        0.1, "Strength of the tie to the reference; simpo: scale of the reward; orpo: weight of the odds ratio", above=0
    )
    label_smoothing: float = key(
        0.0, "Assumed share of pairs whose preference is wrong; sigmoid and simpo", at_least=0, below=0.5
    )
    reduction: str = key(
        "auto",
        "An answer's log-probability is the sum or the mean over its tokens; auto: sum for sigmoid and hinge, mean for "
        "the others",
        choices=("auto", "sum", "mean"),
    )
    sft_weight: float | None = key(
        None,
        "Weight of the chosen answers' mean loss per token, added to the preference loss; none: 1 for orpo, which "
        "contains it, else 0",
        at_least=0,
    )
    simpo_gamma: float = key(0.5, "Margin that simpo asks for between the rewards", at_least=0)
    reference: str | None = key(None, "Folder or hub name of the reference model; none: the start model, model.path")


@dataclass
class KtoConfig:
    beta: float = key(0.1, "Strength of the tie to the reference", above=0)
    desirable_weight: float = key(1.0, "Weight of the losses of desirable answers", at_least=0)
    undesirable_weight: float = key(1.0, "Weight of the losses of undesirable answers", at_least=0)
    kl: bool = key(
        True,
        "Compare answers with a reference point, the KL divergence from the reference estimated on mismatched answers; "
        "false: with 0",
    )
    reference: str | None = key(None, "Folder or hub name of the reference model; none: the start model, model.path")


@dataclass
class SparseConfig:
    density: float | None = key(
        None,
        "Share of the pruned layers' weights that model.path must have kept (0.1: 90 % are removed); none: any",
        above=0,
        at_most=1,
    )
    masks: str | None = key(
        None,
        "Mask file, or the folder it lies in; none: that of model.path, and where it has none the zeros of its weights",
    )
    train_dense: bool = key(
        True, "Train embeddings, norms, biases and other weights that are not pruned too; false: the kept weights only"
    )
    samples: int | None = key(
        None,
        "Samples of an epoch, drawn once from data.train, some of them again where it has fewer; none: all of "
        "data.train",
        at_least=1,
    )
    scale_lr: bool = key(False, "Multiply optim.lr by the square root of the global batch")


@dataclass
class RouterConfig:
    train_routers: bool = key(False, "Train the routers too, not only the gates; lora.enabled: by low-rank adapters")
    quality_loss: str = key(
        "sigmoid",
        "Loss on the gates: sigmoid, mse, beta_moment_matching, mean_variance_regularization, contrastive, ranking, "
        "loss_aware (see docs/select_moe.md), or a registered one",
    )
    quality_weight: float = key(0.01, "Weight of the quality loss", at_least=0)
    balance_weight: float | None = key(None, "Weight of the load-balancing loss; none: the model's own", at_least=0)
    beta_target_mean: float = key(0.5, "beta_moment_matching: mean that the gates are to have", at_least=0, at_most=1)
    beta_target_var: float = key(0.05, "beta_moment_matching: variance that the gates are to have", at_least=0)
    w_mean: float = key(1.0, "beta_moment_matching: weight of the mean's term", at_least=0)
    w_var: float = key(1.0, "beta_moment_matching: weight of the variance's term", at_least=0)
    lambda_var: float = key(0.1, "mean_variance_regularization: weight of the variance", at_least=0)
    corruptions: list[str] = key(
        ["shuffle", "repeat", "replace"],
        "How the corrupted copies that gates are compared on are made; one is drawn for each document",
    )
    held_out: int = key(
        64, "Samples outside the subset on which it is evaluated how gates tell copies; 0: none", at_least=0
    )
    quality_loss_debug: bool = key(False, "Print the terms of the quality loss at every step")
