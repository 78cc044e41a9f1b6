"""Divides a module's experts, rows or layers over groups of ranks, as the configuration asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ds_llm.compat.deepspeed import is_shared_expert
from ds_llm.compat.transformers import chosen_attention
from ds_llm.config.run import Config
from ds_llm.config.sections import ParallelConfig
from ds_llm.models.backbone import backbone
from ds_llm.parallel import experts, sequence, tensor
from ds_llm.parallel.layout import Layout, neighbours


class Division:
    """This rank's part of a model and of batches; without parallelism, all of them.

    module: the objective, with the language model as `model`. settings: DeepSpeed's JSON; the keys of its tensor
    parallelism are added. Raises `UserError` for a model that cannot be divided like this.
    """

    def __init__(self, module: nn.Module, config: Config, settings: dict):
        self.layout = layout = Layout.of(config.parallel)
        self.module, self._clipping = module, 0.0
        if layout.sequence > 1:
            self._kernel = chosen_attention(backbone(module.model).config)
            self._rows = neighbours(layout.sequence)
        if layout.expert > 1:
            experts.spread(module, layout.expert)
        if layout.tensor > 1:
            settings["tensor_parallel"] = tensor.settings(module.model.config, layout.tensor)
            module.config = module.model.config  # where DeepSpeed looks for the number of heads
        self.of_weights = layout.expert > 1 or layout.tensor > 1
        plain = settings["zero_optimization"]["stage"] == 0 and config.train.dtype == "fp32"
        if plain and self.of_weights:
            # DeepSpeed clips here by the mean of what each rank finds for its own part of the weights
            self._clipping, settings["gradient_clipping"] = settings["gradient_clipping"], 0.0

    def part(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's shard of a micro-batch: all of it, or with sequence parallelism a part of every row."""
        size = self.layout.sequence
        return batch if size == 1 else sequence.split(batch, self.layout.rank % size, size)

    def arguments(self, batch: dict) -> dict:
        """The module's arguments for a batch, or for a shard from `part`, on the device."""
        if "row_positions" not in batch:
            return batch
        batch = dict(batch)
        return batch | {"shard": sequence.Shard(self._rows, batch.pop("row_positions"), self._kernel)}

    def train(self, mode: bool) -> None:
        """Attend over rows divided over ranks (mode true), or over whole rows on each rank (mode false)."""
        if self.layout.sequence > 1:
            backbone(self.module.model).set_attn_implementation(sequence.NAME if mode else self._kernel)

    def clipped_norm(self) -> Tensor:
        """Global gradient norm for an optimizer of torch; clips the gradients where DeepSpeed does not. Collective."""
        grads = {p: p.grad for p in self.module.parameters() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm([grad for p, grad in grads.items() if not is_divided(p)])
        if self.of_weights:
            square = sum(grad.double().square().sum() for p, grad in grads.items() if is_divided(p))
            square = torch.as_tensor(square, dtype=torch.float64, device=norm.device)
            dist.all_reduce(square)
            # every group of ranks has all of them
            norm = (
                norm.double() ** 2 + square * max(self.layout.expert, self.layout.tensor) / self.layout.world
            ).sqrt()
        if self._clipping:
            factor = (self._clipping / (norm + 1e-6)).clamp(max=1.0)
            for grad in grads.values():
                grad.mul_(factor)
        return norm

    def whole_weights(
        self, model: nn.Module, gathered: Callable, keeper: Callable[[str], int | None], trained_only: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Names and whole weights of `model` that this rank keeps, one at a time, on the CPU. Collective.

        gathered: context manager that gathers a parameter of ZeRO-3. keeper: of a name the rank that keeps the weight,
        None where no rank does.
        """
        for name, parameter in model.named_parameters():
            if is_shared_expert(parameter) or (trained_only and not parameter.requires_grad):
                continue
            if (keeping := keeper(name)) is None:
                continue
            with gathered(parameter):
                split = tensor.split_dimension(parameter) is not None
                whole = tensor.whole(parameter) if split else parameter.detach()
                if keeping == self.layout.rank:
                    yield name, whole.to("cpu", copy=True)
        yield from experts.whole_weights(model, gathered, keeper)


def check(config: Config) -> None:
    """Raise `UserError` where a run's model cannot be divided as configured. Loads no weights."""
    parallel = config.parallel
    if max(parallel.expert, parallel.sequence, parallel.tensor) == 1:
        return
    from ds_llm.pretrained.architecture import architecture

    check_architecture(architecture(config), parallel)


def check_architecture(found: PreTrainedConfig, parallel: ParallelConfig) -> None:
    """Raise `UserError` where a model with this transformers configuration cannot be divided like this."""
    for module, size in ((experts, parallel.expert), (sequence, parallel.sequence)):
        if size > 1:
            module.check(found, size)
    if parallel.tensor > 1:
        tensor.settings(found, parallel.tensor)


def is_divided(parameter: nn.Parameter) -> bool:
    """Whether expert or tensor parallelism divides a weight."""
    return is_shared_expert(parameter) or tensor.split_dimension(parameter) is not None
