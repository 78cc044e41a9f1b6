"""Optimizers that DeepSpeed's JSON names and the engine makes: Muon, Lion on a CPU, AdamW with 8-bit states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ds_llm.config.run import Config
from ds_llm.engine.processes import device
from ds_llm.errors import UserError
from ds_llm.models.parameters import hidden_matrices
from ds_llm.pretrained.loading import need

Groups = list[dict]


def check(config: Config) -> None:
    """Raise `UserError` where the package of the run's optimizer is missing."""
    if config.optim.name == "adamw8bit":
        need("bitsandbytes", what="optim.name=adamw8bit")


def maker(module: nn.Module, settings: dict) -> Callable[[Groups], torch.optim.Optimizer] | None:
    """The function that makes the optimizer of the DeepSpeed JSON `settings` from groups of `module`'s parameters.

    None where DeepSpeed makes it. DeepSpeed has a Muon too, but picks its weights by names ("embed", "lm_head"), which
    orthogonalises the embedding of GPT-2 and the convolutions of state-space layers.
    """
    params = settings["optimizer"].get("params", {})
    kind = settings["optimizer"]["type"].lower()
    if kind == "muon":
        return lambda groups: _muon(groups, module, **params)
    if kind == "adamw8bit":
        return lambda groups: _adamw_8bit(groups, **params)
    if kind == "lion" and device().type == "cpu":  # DeepSpeed takes its CUDA kernel unless states are offloaded
        return lambda groups: _cpu_lion(groups, **params)
    return None


def _muon(groups: Groups, module: nn.Module, lr: float, **params) -> torch.optim.Optimizer:
    """Muon (Jordan et al., 2024) for the matrices of hidden layers, AdamW for all other weights.

    params: `muon_lr`, `momentum` and `ns_method` of Muon, `adam_lr`, `betas` and `eps` of AdamW, `weight_decay` of
    both. A group's own `weight_decay` counts more.
    """
    from ds_llm.compat.deepspeed import MuonWithAuxAdam  # the import compiles for seconds

    matrices = {id(p) for p in hidden_matrices(module)}
    for parameter in module.parameters():
        parameter.use_muon = id(parameter) in matrices
    own = {"lr": params.pop("muon_lr", lr)} | {k: params.pop(k) for k in ("momentum", "ns_method") if k in params}
    own.setdefault("momentum", 0.95)
    rest = {"lr": params.pop("adam_lr", lr)} | {k: params.pop(k) for k in ("betas", "eps") if k in params}
    decay = params.pop("weight_decay", 0.0)
    if params:
        raise UserError(f"deepspeed: optimizer.params.{sorted(params)[0]}: Muon has no such parameter")
    halves = []
    for group in groups:
        for muon, options in ((True, own), (False, rest)):
            chosen = [p for p in group["params"] if p.use_muon is muon]
            if chosen:
                halves.append({"weight_decay": decay} | group | options | {"params": chosen, "use_muon": muon})
    return MuonWithAuxAdam(halves, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})


def _cpu_lion(groups: Groups, **params) -> torch.optim.Optimizer:
    """Lion (Chen et al., arXiv:2302.06675) by DeepSpeed's kernel for CPUs, which is compiled once."""
    from ds_llm.compat.deepspeed import DeepSpeedCPULion

    return DeepSpeedCPULion(groups, **params)


def _adamw_8bit(groups: Groups, **params) -> torch.optim.Optimizer:
    """AdamW whose two moments are held in 8 bits by blocks (Dettmers et al., arXiv:2110.02861)."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **params)
