"""Output head and loss of a causal language model, without ever holding all its logits."""

from __future__ import annotations

import contextlib
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_llm.compat.deepspeed import is_partitioned
from ds_llm.compat.peft import without_wrapper
from ds_llm.compat.torch import FakeTensor
from ds_llm.errors import UserError
from ds_llm.kernels.token_stats import TokenStats, linear_cross_entropy, linear_token_stats
from ds_llm.models.backbone import backbone
from ds_llm.models.cut import small_configs, small_model
from ds_llm.models.deferred import Deferred
from ds_llm.models.documents import Documents
from ds_llm.models.isolation import run_backbone

IGNORE_INDEX = -100
MOST_PROBED = 50_000_000  # parameters of a model whose logits are compared with its head's
CHUNK_TOKENS = 1024  # logits of so many tokens exist at a time where a head is not a plain linear layer


class LMHead(nn.Linear):
    """Output embedding [vocab, hidden] that also computes the loss, and statistics of what it predicts.

    Both are computed inside the module's own forward, so whatever makes the weight available for a forward pass
    (DeepSpeed ZeRO-3's hooks) makes it available for them.
    """

    logit_scale: float = 1.0  # logits are multiplied by this before the soft cap; not in plain logits
    softcap: float | None = None  # c replaces a logit x by c * tanh(x / c); not in plain logits

    def forward(self, hidden: Tensor, labels: Tensor | None = None, reduction: str = "sum") -> Tensor | TokenStats:
        """Logits [..., vocab] of hidden [..., H]; with `labels` [...] the cross-entropy in nats instead.

        labels[i] is what hidden[i] predicts (no shift here), `IGNORE_INDEX` where nothing is. `reduction` is "sum",
        "mean" (over the valid labels) or "none" (a loss per label, flattened). "stats": entropy, log-probability and
        more per label instead of the loss, without gradients, see `linear_token_stats`.
        """
        if labels is None:
            return super().forward(hidden)
        bias = self.bias
        if self.logit_scale != 1.0:
            hidden = hidden * self.logit_scale
            bias = None if bias is None else bias * self.logit_scale
        flat = hidden.reshape(-1, hidden.shape[-1])
        if reduction == "stats":
            return linear_token_stats(flat, self.weight, labels.reshape(-1), bias=bias, softcap=self.softcap)
        return linear_cross_entropy(
            flat, self.weight, labels.reshape(-1), bias=bias, softcap=self.softcap, reduction=reduction
        )


def head_loss(head: nn.Module, hidden: Tensor, labels: Tensor, reduction: str = "sum") -> Tensor:
    """Cross-entropy of already shifted labels through any output head, float32: summed, or with `reduction` "none" one
    per label, flattened.

    An `LMHead`, or an ensemble of them, computes it in one go. A head that something wraps (a LoRA adapter on it, a
    trained copy) is called as it is on `CHUNK_TOKENS` tokens at a time, and again in the backward pass.
    """
    if isinstance(head, LMHead) or (_is_ensemble(head) and head.computes_loss):
        return head(hidden, labels, reduction)
    inner = next((m for m in head.modules() if isinstance(m, LMHead)), None)
    scale, softcap = (inner.logit_scale, inner.softcap) if inner is not None else (1.0, None)

    def chunk_loss(rows: Tensor, targets: Tensor) -> Tensor:
        logits = head(rows).float() * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction=reduction)

    flat = hidden.reshape(-1, hidden.shape[-1])
    chunks = zip(flat.split(CHUNK_TOKENS), labels.reshape(-1).split(CHUNK_TOKENS), strict=True)
    parts = [checkpoint(chunk_loss, rows, targets, use_reentrant=False) for rows, targets in chunks]
    return torch.cat(parts) if reduction == "none" else torch.stack(parts).sum()


def loss_and_logits(
    model: nn.Module,
    hidden: Tensor,
    labels: Tensor | None,
    num_items_in_batch: int | Tensor | None,
    logits_to_keep: int | Tensor,
    aux_loss: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Loss and logits of a causal language model from its last hidden states [B, S, H].

    labels [B, S]: not shifted, `IGNORE_INDEX` where nothing is learned. The loss is the summed cross-entropy divided by
    `num_items_in_batch`, or by the number of valid labels if that is None. In training `aux_loss` is added to it.
    Without labels the loss is None.

    The logits are those of the last `logits_to_keep` positions (0: all), or of the positions in an index tensor. In
    training with labels they are None.
    """
    loss = logits = None
    if labels is not None:
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        items = (shifted != IGNORE_INDEX).sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        loss = head_loss(model.lm_head, hidden, shifted) / items
        if model.training and aux_loss is not None:
            loss = loss + aux_loss
    if labels is None or not model.training:
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = model.lm_head(hidden[:, keep])
    return loss, logits


def attach_loss_head(model: nn.Module) -> nn.Module:
    """Let any transformers causal language model compute its loss in its output embedding; returns the model.

    The head's class becomes `LMHead`; parameters and state-dict keys stay as they are. A final soft cap (Gemma) or a
    factor on the logits (Granite, Cohere) is carried over. A few logits, of the model or of a small one of
    its configuration, are compared with the head's. Raises `UserError` where the head is not linear or the
    comparison fails.
    """
    head = model.get_output_embeddings()
    kind = model.config.model_type
    if isinstance(head, LMHead):
        return model
    if _is_ensemble(head):
        head.attach()
        return model
    if type(head) is not nn.Linear:
        raise UserError(
            f"cannot train or score a '{kind}' model: its output head is {type(head).__name__}, not a linear layer"
        )
    head.__class__ = LMHead
    head.logit_scale, head.softcap = logit_transform(model)
    _check_head(model)
    return model


def _is_ensemble(head: nn.Module) -> bool:
    """Whether it is the head of a boosted model, see `ds_llm.models.boost`."""
    return hasattr(type(head), "attach")


def logit_transform(model: nn.Module) -> tuple[float, float | None]:
    """Factor and soft cap that the model's own forward applies to the logits."""
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):
        scale = float(config.logit_scale)
    elif getattr(config, "lm_head_multiplier", None):
        scale = float(config.lm_head_multiplier)
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return scale, softcap


def _check_head(model: nn.Module) -> None:
    """Compare logits of the model, or of a small one of its configuration where it is large or not read yet."""
    weights = list(model.parameters())
    if any(p.device.type == "meta" or is_partitioned(p) or isinstance(p, FakeTensor) for p in weights):
        return  # no weights here to try it with
    if not any(isinstance(p, Deferred) for p in weights) and sum(p.numel() for p in weights) <= MOST_PROBED:
        _compare(model)
        return
    with torch.random.fork_rng(devices=[]):
        for config in small_configs(model.config):
            with contextlib.suppress(RuntimeError):  # some sizes do not fit together
                _compare(small_model(config, "eager", torch.device("cpu")))
                return


@torch.no_grad()
def _compare(model: nn.Module) -> None:
    """Raise `UserError` where a model's logits are not what its head and `logit_transform` give."""
    training, head, (scale, softcap) = model.training, model.get_output_embeddings(), logit_transform(model)
    model.eval()
    try:
        ids = torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]
        expected = model(input_ids=ids, use_cache=False).logits.float()
        found = head(backbone(model)(input_ids=ids, use_cache=False).last_hidden_state).float() * scale
    finally:
        model.train(training)
    if softcap is not None:
        found = torch.tanh(found / softcap) * softcap
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 5e-2
    if found.shape != expected.shape or (found - expected).abs().max() > tolerance * expected.abs().max().clamp_min(1):
        raise UserError(
            f"cannot train or score a '{model.config.model_type}' model: its logits are not a linear function of its "
            "last hidden state with the factor and soft cap that its configuration names"
        )


class LMLoss(NamedTuple):
    """Loss of a micro-batch. `loss_sum`: summed cross-entropy in nats over the valid labels, float32 scalar, or one sum
    per row [B] where that was asked for.

    `aux_loss`: what the model's experts add to the loss, weighted and summed over layers (0 without experts).
    `aux_report`: the load-balancing loss without its weight, mean over layers. `expert_counts` [layers, E] int32: how
    often each expert was chosen. Both None without experts.
    """

    loss_sum: Tensor
    aux_loss: Tensor
    aux_report: Tensor | None
    expert_counts: Tensor | None


def lm_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    per_row: bool = False,
    shard=None,
    packed: Documents | None = None,
) -> LMLoss:
    """Forward pass and loss of a causal language model whose head `attach_loss_head` has prepared.

    input_ids [B, S]; labels [B, S] ALREADY SHIFTED (labels[b, s] is what position s predicts, -100: nothing);
    position_ids [B, S] restarting at 0 where a packed document starts; packed: these documents, which are looked up on
    the model's device where they are not given. attention_mask [B, S], 0 where padding, is for rows that are not
    packed; token_mask [B, S] bool, False where padding, for packed ones: it only keeps padding out of
    the experts' statistics. Mixture-of-experts models of transformers use their own load-balancing loss and coefficient
    where they define one. per_row: the loss as a sum per row [B]. shard (`ds_llm.parallel.sequence.Shard`): where the
    tensors are parts of rows; the loss is then that of this part, and what is added for experts that of whole rows.
    """
    balanced = balancing_loss(model)
    extra = {} if balanced is None else {"output_router_logits": True}
    if shard is not None:
        extra["shard"] = shard
    out = run_backbone(model, input_ids, position_ids, attention_mask, token_mask, packed, **extra)
    hidden = out.last_hidden_state
    loss_sum = head_loss(model.get_output_embeddings(), hidden, labels, "none" if per_row else "sum")
    if per_row:
        loss_sum = loss_sum.view(labels.shape).sum(-1)
    mask = attention_mask if token_mask is None else token_mask.long()
    if shard is not None and balanced is not None and out.router_logits:
        out.router_logits = tuple(map(shard.gather, out.router_logits))
        mask = None if mask is None else shard.gather(mask)
    experts = expert_figures(out, balanced, mask)
    return LMLoss(loss_sum, *(experts or (loss_sum.new_zeros(()), None, None)))


def expert_figures(out, balanced, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """(aux loss, its report, expert counts) of a backbone's output, see `LMLoss`; None where it has no experts.

    balanced: what `balancing_loss` gives of the model; mask [B, S]: 0 where padding.
    """
    if getattr(out, "expert_counts", None) is not None:
        return out.aux_loss, out.aux_report, out.expert_counts
    return balanced(out.router_logits, mask) if balanced is not None and out.router_logits else None


def balancing_loss(model: nn.Module):
    """A function of (router logits, attention mask) that gives (aux loss, report, counts), or None without one."""
    base = without_wrapper(model)
    function = getattr(sys.modules[type(base).__module__], "load_balancing_loss_func", None)
    config = base.config.get_text_config()
    weight = getattr(config, "router_aux_loss_coef", None)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    top_k = getattr(config, "num_experts_per_tok", None)
    if function is None or weight is None or not experts or not top_k:
        return None

    def loss(router_logits: tuple[Tensor, ...], attention_mask: Tensor | None):
        balance = function(router_logits, experts, top_k, attention_mask)
        with torch.no_grad():
            counts = []
            for logits in router_logits:
                chosen = logits.topk(top_k, dim=-1).indices
                counted = torch.ones_like(chosen, dtype=torch.int32)
                if attention_mask is not None:
                    counted *= attention_mask.reshape(-1, 1).bool()
                # not torch.bincount, for which a GPU would be waited
                count = torch.zeros(experts, dtype=torch.int32, device=logits.device)
                counts.append(count.scatter_add_(0, chosen.reshape(-1), counted.reshape(-1)))
        return weight * balance, balance.detach() / top_k, torch.stack(counts)  # transformers counts every choice

    return loss
