"""Tensor parallelism (DeepSpeed AutoTP): each rank of a group holds a slice of every attention and MLP layer."""

from __future__ import annotations

import contextlib
import io
from types import SimpleNamespace

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_llm.compat.deepspeed import DS_AUTOTP_UC_META, groups
from ds_llm.errors import UserError, first_line
from ds_llm.models.parameters import exact_buffers, restore_buffers

# Kinds of layers in a transformers model's plan -> DeepSpeed's names. Norms of a rank's heads are not split: every rank
# computes a part of their gradient.
STYLES = {"colwise": "column", "rowwise": "row", "replicated_with_grad_allreduce": "skip"}
# Embeddings and output heads stay whole: the loss needs the whole head, and never holds all logits.
WHOLE = ("embedding_rowwise", "colwise_rep", "colwise_gather_output", "vocab")


def settings(architecture, size: int) -> dict:
    """The section `tensor_parallel` of DeepSpeed's JSON for a model with this transformers configuration.

    Raises `UserError` where the model has no tensor-parallel plan, or `size` does not divide its heads or widths.
    """
    kind, config = architecture.model_type, architecture.get_text_config()
    plan = getattr(architecture, "base_model_tp_plan", None) or {}
    plan = {pattern: style for pattern, style in plan.items() if style not in WHOLE}
    unknown = sorted(set(plan.values()) - set(STYLES))
    if unknown:
        raise UserError(
            f"parallel.tensor: DeepSpeed cannot split a '{kind}' model: its plan has layers of the kinds "
            f"{', '.join(unknown)}; for experts use parallel.expert"
        )
    if not plan:
        raise UserError(f"parallel.tensor: transformers has no plan of how to split a '{kind}' model")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % size:
            raise UserError(f"parallel.tensor: {size} does not divide the model's {name}={getattr(config, name)}")
    specs = []
    for pattern, style in plan.items():
        regex = r".*\b" + pattern.replace(".", r"\.").replace("*", r"\d+") + r"\.weight$"
        specs.append({"patterns": [regex], "partition_type": STYLES[style], "grad_allreduce": STYLES[style] == "skip"})
    return {
        "autotp_size": size,
        "vocab_parallel_lm_head": False,
        "partition_config": {"use_default_specs": False, "layer_specs": specs},
    }


def group() -> dist.ProcessGroup:
    """This rank's tensor group. DeepSpeed must have created it."""
    return groups.get_tensor_model_parallel_group()


def split_dimension(parameter: nn.Parameter) -> int | None:
    """The dimension along which the tensor group splits a weight; None where every rank has the whole weight."""
    description = getattr(parameter, DS_AUTOTP_UC_META, None)
    return None if description is None or description["replicated"] else description["partition_dim"]


def note_whole_shapes(module: nn.Module) -> None:
    """Set `whole_shape`, see `ds_llm.hardware.whole_shape`, of the weights that DeepSpeed has split."""
    for parameter in module.parameters():
        if split_dimension(parameter) is not None:
            parameter.whole_shape = torch.Size(getattr(parameter, DS_AUTOTP_UC_META)["logical_shape"])


def whole(parameter: nn.Parameter) -> Tensor:
    """The whole of a split weight. Collective over the tensor group."""
    parts = [torch.empty_like(parameter) for _ in range(dist.get_world_size(group()))]
    dist.all_gather(parts, parameter.detach().contiguous(), group=group())
    return torch.cat(parts, dim=split_dimension(parameter))


def split_layers(module: nn.Module, ranks: int, device: torch.device) -> dist.ProcessGroup:
    """Split the layers of a frozen transformers model over groups of `ranks` neighbouring ranks, in place (AutoTP).

    Returns this rank's group, whose ranks must then all call the module with equal inputs. Raises `UserError` where
    DeepSpeed finds no layers that it can split.
    """
    groups = [dist.new_group(list(range(i, i + ranks))) for i in range(0, dist.get_world_size(), ranks)]
    group = groups[dist.get_rank() // ranks]
    exact, before = exact_buffers(module), sum(p.numel() for p in module.parameters())
    # given a group alone, DeepSpeed 0.19 makes another one of the first ranks
    parallel = {"tp_size": ranks, "tp_group": group, "mpu": SimpleNamespace(get_model_parallel_group=lambda: group)}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its plan
        try:
            deepspeed.init_inference(module, tensor_parallel=parallel, dtype=next(module.parameters()).dtype)
        except (AssertionError, ValueError, RuntimeError, AttributeError) as error:
            kind = module.config.model_type
            raise UserError(f"DeepSpeed cannot split a '{kind}' model: {first_line(error)}") from None
    restore_buffers(module, exact, device)
    if sum(p.numel() for p in module.parameters()) == before:
        raise UserError(f"DeepSpeed knows no layers of a '{module.config.model_type}' model that it can split")
    return group
