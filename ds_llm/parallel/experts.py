"""Expert parallelism: each rank of a group holds a share of every layer's experts, and tokens are sent to them.

Only the module with a block's experts is replaced. Routers, shared experts and auxiliary losses stay as they are, in
our models and in those of transformers. The replacement is one of DeepSpeed's own AutoEP layers, so that ZeRO reduces,
shards, saves and restores its weights among the ranks that hold the same experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ds_llm.compat.deepspeed import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
    AutoEPMoELayer,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
    share_experts,
)
from ds_llm.errors import UserError
from ds_llm.kernels.moe_routing import permute, unpermute
from ds_llm.models.expert_modules import is_fused, is_shareable
from ds_llm.models.moe import Experts, grouped_linear
from ds_llm.parallel.layout import Exchange


class ExpertShare(AutoEPMoELayer):
    """The experts that `rank` of `size` ranks holds; replaces a module with all experts.

    `experts.w1` and `experts.w3` [E / size, I, H] are the gate and up projections, `experts.w2` [E / size, H, I] the
    down projection, as DeepSpeed's AutoEP names them. Every rank of the group must call it equally often.
    """

    def __init__(self, source: nn.Module, size: int, rank: int):
        nn.Module.__init__(self)  # AutoEP's own would make a router too
        self.num_experts, self.num_local_experts = source.num_experts, source.num_experts // size
        self.ep_size, self.ep_rank, self.ep_group_name, self.ep_group = size, rank, f"ep_size_{size}", None
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, size
        )
        self.folding_group_handles, self._async_split_plan_pending = None, None
        self.activation: Callable[[Tensor], Tensor] = getattr(source, "act_fn", nn.functional.silu)
        self.weights_first = isinstance(source, Experts)
        first = rank * self.num_local_experts
        mine = range(first, first + self.num_local_experts)
        gate_up, down = (p.detach()[first : mine.stop] for p in (source.gate_up_proj, source.down_proj))
        gate, up = gate_up.chunk(2, dim=1)
        self.experts = nn.Module()
        for name, value in (("w1", gate), ("w2", down), ("w3", up)):
            weight = nn.Parameter(value.clone(memory_format=torch.contiguous_format), source.down_proj.requires_grad)
            share_experts(weight, self.ep_group_name)
            weight.whole_shape = torch.Size([self.num_experts, *weight.shape[1:]])
            shape = list(weight.whole_shape)
            description = {
                AUTOEP_EXPERT_PLACEMENT: self.expert_placement_descriptor,
                AFFINE_MAP: autoep_placement_to_affine_map(self.expert_placement_descriptor, shape).to_dict(),
                AUTOEP_PARAM_LOGICAL_SHAPE: shape,
                AUTOEP_PARAM_EP_RANK: rank,
                AUTOEP_PARAM_LOCAL_EXPERTS: list(mine),
            }
            setattr(weight, DS_AUTOEP_UC_META, description)
            self.experts.register_parameter(name, weight)

    def forward(self, hidden: Tensor, *choice: Tensor) -> Tensor:
        """Weighted sum of each token's experts, equal to that of the replaced module.

        hidden [T, H]; choice: experts [T, K] (-1: none) and their weights [T, K], in the replaced module's order.
        """
        weights, experts = choice if self.weights_first else reversed(choice)
        rows, offsets, inverse = permute(hidden, experts, self.num_experts)
        counts = offsets.diff(prepend=offsets.new_zeros(1)).view(self.ep_size, -1)  # [rank, its experts]
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts.contiguous(), group=self.ep_group)
        sent, received = torch.stack([counts.sum(1), arriving.sum(1)]).tolist()
        own = Exchange.apply(rows[: sum(sent)], sent, received, self.ep_group)
        # they arrive by origin and then by expert
        kinds = torch.arange(self.num_local_experts, device=rows.device).repeat(self.ep_size)
        order = kinds.repeat_interleave(arriving.view(-1), output_size=sum(received)).argsort(stable=True)
        back = self._run(own[order], arriving.sum(0).cumsum(0).to(offsets.dtype))[order.argsort()]
        out = Exchange.apply(back, received, sent, self.ep_group)
        out = torch.cat([out, out.new_zeros(len(rows) - len(out), out.shape[1])])
        return unpermute(out, inverse, weights).to(hidden.dtype)

    def _run(self, rows: Tensor, offsets: Tensor) -> Tensor:
        gate, up = (grouped_linear(rows, w, offsets) for w in (self.experts.w1, self.experts.w3))
        return grouped_linear(self.activation(gate) * up, self.experts.w2, offsets)


def check(architecture, size: int) -> None:
    """Raise `UserError` where `size` ranks cannot share the experts of a model with this transformers configuration."""
    config = architecture.get_text_config()
    # they say a number without experts too
    names = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
    count = next((n for name in names if (n := getattr(config, name, None))), 0)
    if not count or not getattr(config, "use_moe", True):
        raise UserError(f"parallel.expert: a '{config.model_type}' model of this configuration has no experts")
    if count % size:
        raise UserError(f"parallel.expert: {size} does not divide the model's {count} experts")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    if not any(map(is_shareable, model.modules())):
        raise _not_shareable(model)


def spread(module: nn.Module, size: int) -> None:
    """Replace the experts of all layers by this rank's share, in place. `size` neighbouring ranks form a group.

    Raises `UserError` for a module without experts of a known kind.
    """
    rank, done = dist.get_rank() % size, 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if is_shareable(child):
                setattr(parent, name, ExpertShare(child, size, rank))
                done += 1
    if not done:
        raise _not_shareable(module)


def _not_shareable(module: nn.Module) -> UserError:
    kinds = sorted({type(m).__name__ for m in module.modules() if is_fused(m)})
    return UserError(
        f"parallel.expert: {', '.join(kinds) or 'the experts'} of this model cannot be shared: that needs one 3-D "
        "weight for gate and up projections, one for down projections, and no bias; use zero=3"
    )


def whole_weights(
    model: nn.Module, gathered: Callable, keeper: Callable[[str], int | None]
) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of all experts as in the replaced modules, those that this rank keeps, on the CPU. Collective.

    gathered: context manager that gathers a parameter of ZeRO-3. keeper: of a name the rank that keeps the weight, None
    where no rank does.
    """
    for name, module in model.named_modules():
        if not isinstance(module, ExpertShare) or (keeping := keeper(f"{name}.gate_up_proj")) is None:
            continue
        found, mine = {}, keeping == dist.get_rank()
        for leaf, weight in module.experts.named_parameters():
            with gathered(weight):
                parts = [torch.empty_like(weight) for _ in range(module.ep_size)]
                dist.all_gather(parts, weight.detach().contiguous(), group=module.ep_group)
                found[leaf] = torch.cat(parts).cpu() if mine else None
        if mine:
            yield f"{name}.gate_up_proj", torch.cat([found["w1"], found["w3"]], 1)
            yield f"{name}.down_proj", found["w2"]
