"""Mixture-of-experts feed-forward block: router, grouped experts, shared experts, auxiliary losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_llm.kernels.moe_routing import RoutingStats, load_balancing_loss, permute, route, unpermute, z_loss


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202)."""
    return F.silu(gate) * up


class MLP(nn.Module):
    """SwiGLU feed-forward layer: hidden [..., hidden_size] -> [..., hidden_size]."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.down_proj.into_residual = True  # its initial weights are smaller

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(hidden), self.up_proj(hidden)))


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each expert's rows by that expert's matrix.

    rows [R, in] sorted by expert, weight [E, out, in], offsets [E] int32 (the end of each expert's rows) -> [R, out].
    What stands in rows behind the last offset is not defined. Every expert of `weight` gets a gradient, zero where it
    had no row.
    """
    rows = rows.to(weight.dtype)
    if _has_grouped_mm(rows, weight):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    parts = [rows[i:j] @ expert.t() for i, j, expert in zip(starts, ends, weight.unbind(0), strict=True)]
    # not a product of the rows behind the last offset: they may hold NaN, which times a zero gradient is NaN
    return torch.cat([*parts, rows.new_zeros(rows.shape[0] - ends[-1], weight.shape[1])])


def _has_grouped_mm(rows: Tensor, weight: Tensor) -> bool:
    """The kernel wants 16-byte rows of a 16- or 32-bit type, at least one row and, on a GPU, compute capability 8.0."""
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not rows.shape[0]:
        return False
    if any(size * weight.element_size() % 16 for size in weight.shape[1:]):
        return False
    return weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) >= (8, 0)


class Router(nn.Module):
    """Linear scores of the experts, in float32 (float64 for float64 input): hidden [T, H] -> logits [T, E]."""

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(dtype), self.weight.to(dtype))


class Experts(nn.Module):
    """The routed experts, SwiGLU layers held as two 3-D parameters.

    `gate_up_proj` [E, 2 * I, H] (gate rows first), `down_proj` [E, H, I].
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Weighted sum of each token's experts.

        hidden [T, H], weights [T, K] and experts [T, K] as `route` returns them (-1: no expert) -> [T, H].
        """
        rows, offsets, inverse = permute(hidden, experts, self.num_experts)
        gate, up = grouped_linear(rows, self.gate_up_proj, offsets).chunk(2, dim=-1)
        return unpermute(grouped_linear(swiglu(gate, up), self.down_proj, offsets), inverse, weights)


class MoEBlock(nn.Module):
    """Routed and shared experts in place of a layer's MLP, with the auxiliary losses of the router.

    One module holds every parameter that routing could leave unused on one rank, so DeepSpeed can gather it whole
    (ZeRO-3 leaf module). Scores are softmax or sigmoid of the router logits; the weights of the chosen experts are
    renormalised by their sum + 1e-20 when `norm_topk_prob`. The balance loss is E * sum_e f_e P_e (Fedus et al.,
    "Switch Transformers", arXiv:2101.03961), over the batch or averaged over sequences (DeepSeek-V2,
    arXiv:2405.04434): 1 when routing is uniform. The z-loss is the mean squared logsumexp of the router logits
    (Zoph et al., "ST-MoE", arXiv:2202.08906).
    """

    def __init__(self, config):
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.top_k = config.num_experts_per_tok
        self.scoring, self.normalize = config.scoring_func, config.norm_topk_prob
        self.aux_loss_alpha, self.seq_aux, self.z_loss_alpha = (
            config.aux_loss_alpha,
            config.seq_aux,
            config.z_loss_alpha,
        )
        self.bias_speed = config.router_bias_speed
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if self.bias_speed else None
        self.register_buffer("e_score_correction_bias", bias)
        self.gate = Router(hidden, config.n_routed_experts)
        self.experts = Experts(config.n_routed_experts, hidden, width)
        self.shared_experts = MLP(hidden, config.n_shared_experts * width) if config.n_shared_experts else None

    def forward(self, hidden: Tensor, mask: Tensor | None = None, shard=None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden [B, S, H]; mask [B, S] bool, False where a token is padding and takes no part in routing; shard
        (`ds_llm.parallel.sequence.Shard`): where these are parts of rows, over which the losses are taken.

        Returns the output [B, S, H]; the auxiliary loss (weighted sum of balance and z-loss, a scalar to be added to
        the loss); the balance loss alone, detached; and how often each expert was chosen, [E] int32.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        weights, experts, stats = route(
            self.gate(flat),
            self.top_k,
            scoring=self.scoring,
            normalize=self.normalize,
            bias=self.e_score_correction_bias,
            mask=None if mask is None else mask.reshape(-1),
            sequences=hidden.shape[0],
        )
        out = self.experts(flat, weights, experts)
        if self.shared_experts is not None:
            out = out + self.shared_experts(flat)
        if shard is not None:
            stats = RoutingStats(*map(shard.total, stats))
        balance = load_balancing_loss(stats, per_sequence=self.seq_aux)
        aux = self.aux_loss_alpha * balance
        if self.z_loss_alpha:
            aux = aux + self.z_loss_alpha * z_loss(stats)
        return out.view_as(hidden), aux, balance.detach(), stats.counts.sum(0, dtype=torch.int32)


@torch.no_grad()
def balance(model: nn.Module, load: list[list[float]]) -> None:
    """Move the biases of a model's routers by `bias_speed` towards experts that got less than the mean, in place.

    load: share of the global batch that each expert got, [layers with experts][E]. No loss is added and no gradient
    changed (Wang et al., "Auxiliary-Loss-Free Load Balancing", arXiv:2408.15664, algorithm 1). Models without such
    biases stay as they are.
    """
    blocks = [module for module in model.modules() if isinstance(module, MoEBlock)]
    for block, shares in zip(blocks, load, strict=False):
        if block.bias_speed:
            got = torch.tensor(shares, device=block.e_score_correction_bias.device)
            block.e_score_correction_bias += block.bias_speed * (got.mean() - got).sign()
