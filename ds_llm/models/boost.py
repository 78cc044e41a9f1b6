"""Boosted models: an ensemble of causal language models with one vocabulary, as one Hugging Face model.

Two sub-models vote by z = (1 - lambda) z_0 + lambda z_1, where z are logits. More than two vote by their mean. A
sub-model may also read what its predecessor's attention reads (`ds_llm.models.predecessor`). The vote of linear heads
is itself a linear head on the concatenated hidden states. Loss and token statistics are therefore computed from these,
as for any other model (`ds_llm.models.head`).

Weights are named `sub_models.{i}.` followed by the sub-model's own name. Importing this module registers the model with
transformers' Auto classes.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)

from ds_llm.compat.hf_model import CausalModel, cache_argument, model_output, takes_cache
from ds_llm.compat.transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    Cache,
    CausalLMOutputWithPast,
    ModelOutput,
    can_return_tuple,
    choose_attention,
    chosen_attention,
)
from ds_llm.kernels.token_stats import TokenStats, linear_cross_entropy, linear_token_stats
from ds_llm.models import predecessor
from ds_llm.models.boost_config import QwenBoostConfig, sub_config
from ds_llm.models.head import (
    LMHead,
    attach_loss_head,
    backbone,
    balancing_loss,
    expert_figures,
    logit_transform,
    loss_and_logits,
)


@model_output
class MixedOutput(ModelOutput):
    """Output of `MixedBackbone`.

    `last_hidden_state` [B, S, sum of H_i]: hidden states of the sub-models, concatenated. With experts, as in
    `DecoderOutput`: `aux_loss` and `aux_report` of the sub-models that are trained, `expert_counts` of all layers.
    """

    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    aux_loss: Tensor | None = None
    aux_report: Tensor | None = None
    expert_counts: Tensor | None = None


class MixedHead(nn.Module):
    """The weighted sum of the sub-models' logits. It has no weights of its own."""

    def __init__(self, model: "QwenBoostForCausalLM"):
        super().__init__()
        self._model = (model,)  # in a tuple: not a child of its own child

    @property
    def out_features(self) -> int:
        return self._model[0].config.vocab_size

    @property
    def heads(self) -> list[nn.Module]:
        return [part.get_output_embeddings() for part in self._model[0].sub_models]

    @property
    def computes_loss(self) -> bool:
        """Whether all heads are plain linear layers. A head with an adapter must be called as it is."""
        return all(isinstance(head, LMHead) and head.bias is None for head in self.heads)

    def attach(self) -> None:
        """Prepare every sub-model's head, see `attach_loss_head`."""
        for part in self._model[0].sub_models:
            attach_loss_head(part)

    def forward(self, hidden: Tensor, labels: Tensor | None = None, reduction: str = "sum") -> Tensor | TokenStats:
        """As `LMHead.forward`, for hidden [..., sum of H_i]. Labels may be given only where `computes_loss`."""
        heads, weights = self.heads, self._model[0].vote()
        parts = hidden.split([part.config.get_text_config().hidden_size for part in self._model[0].sub_models], -1)
        if labels is None:
            return sum(w * head(part) for w, head, part in zip(weights, heads, parts, strict=True))
        # ZeRO-3 gathers weights that are used outside of their own module where a module that it knows uses them:
        # hence this is a module
        weight = torch.cat([head.weight for head in heads], 1)
        hidden = torch.cat([w * part for w, part in zip(weights, parts, strict=True)], -1).flatten(0, -2)
        labels = labels.reshape(-1)
        if reduction == "stats":
            return linear_token_stats(hidden, weight, labels)
        return linear_cross_entropy(hidden, weight, labels, reduction=reduction)


class MixedBackbone(nn.Module):
    """The sub-models' backbones. They run one after the other on the same tokens."""

    takes_token_mask = True

    def __init__(self, model: "QwenBoostForCausalLM"):
        super().__init__()
        self._model = (model,)

    @property
    def config(self) -> QwenBoostConfig:
        return self._model[0].config

    @takes_cache
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        token_mask: Tensor | None = None,
        **kwargs,
    ) -> MixedOutput:
        """Arguments as for any transformers decoder; token_mask [B, S] bool: False where padding, for experts."""
        model = self._model[0]
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden, states, experts = [], None, []
        for part, part_cache in zip(model.sub_models, self._caches(cache), strict=True):
            body, extra = backbone(part), dict(kwargs)
            if token_mask is not None and getattr(body, "takes_token_mask", False):
                extra["token_mask"] = token_mask
            balanced = balancing_loss(part) if model.training else None
            if balanced is not None:
                extra["output_router_logits"] = True
            if states is not None:
                extra[predecessor.STATES] = states
            if self.config.is_llmboost:
                extra["output_hidden_states"] = part is not model.sub_models[-1]
            out = body(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **cache_argument(part_cache),
                use_cache=bool(use_cache),
                **extra,
            )
            hidden.append(out.last_hidden_state)
            if extra.get("output_hidden_states"):
                states = predecessor.attention_inputs(part, out.hidden_states)
            if figures := expert_figures(out, balanced, attention_mask if token_mask is None else token_mask.long()):
                experts.append((part, *figures))
        found = MixedOutput(last_hidden_state=torch.cat(hidden, -1), **cache_argument(cache))
        learning = [entry for entry in experts if any(p.requires_grad for p in entry[0].parameters())]
        if learning and len({entry[3].shape[-1] for entry in learning}) == 1:
            _, aux, report, counts = zip(*learning, strict=True)
            found.aux_loss, found.aux_report = torch.stack(aux).sum(), torch.stack(report).mean()
            found.expert_counts = torch.cat(counts)
        return found

    def _caches(self, cache: Cache | None) -> Sequence[Cache | None]:
        """For each sub-model a cache of its own layers; they are those of `cache`, which has all."""
        counts = [part.config.get_text_config().num_hidden_layers for part in self._model[0].sub_models]
        if cache is None:
            return [None] * len(counts)
        if not cache.layers:
            cache.layers.extend(DynamicCache(config=self.config).layers)
        if len(cache.layers) != sum(counts):
            raise ValueError(f"cache: has {len(cache.layers)} layers, the sub-models {sum(counts)}")
        views, start = [], 0
        for count in counts:
            view = copy.copy(cache)
            view.layers = cache.layers[start : start + count]
            views.append(view)
            start += count
        return views


class QwenBoostForCausalLM(CausalModel, GenerationMixin):
    """A vote of causal language models (Qwen, Llama or any other architecture with a linear head)."""

    config_class = QwenBoostConfig
    base_model_prefix = ""

    def __init__(self, config: QwenBoostConfig):
        super().__init__(config)
        parts = []
        for values in config.sub_model_cfgs:
            sub = sub_config(values)
            choose_attention(sub, chosen_attention(config))
            kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(sub)]
            parts.append((kind[0] if isinstance(kind, tuple) else kind)(sub))
        self._adopt(parts)
        self.post_init()
        if config.is_llmboost:
            for part in parts[1:]:
                predecessor.reset(part)  # post_init has filled them like other weights

    def _adopt(self, parts: Sequence[PreTrainedModel]) -> None:
        for part in parts:
            if logit_transform(part)[1] is not None:
                raise ValueError(f"a '{part.config.model_type}' model cannot vote: its logits have a soft cap")
        if self.config.is_llmboost:
            for before, after in pairwise(parts):
                predecessor.connect(before, after, self.config.connection)
        self.sub_models = nn.ModuleList(parts)
        # transformers asks children for what they tie, and a ModuleList does not know
        self.sub_models.all_tied_weights_keys = {
            f"{i}.{name}": f"{i}.{source}"
            for i, part in enumerate(parts)
            for name, source in part.all_tied_weights_keys.items()
        }
        self.lm_head = MixedHead(self)
        self._backbone = (MixedBackbone(self),)

    @classmethod
    def from_sub_models(
        cls, models: Sequence[PreTrainedModel], fusion_lambda: float = 0.5, connection: str | None = None
    ) -> Self:
        """A boosted model made of these models themselves, not of copies; it gives their vote.

        connection: None, or how each is fed by its predecessor, from where it stands and with weights that are 0.
        Raises ValueError where they do not fit together.
        """
        config = QwenBoostConfig(
            sub_model_cfgs=[{**model.config.to_dict(), "model_type": model.config.model_type} for model in models],
            fusion_lambda=fusion_lambda,
            is_llmboost=connection is not None,
            connection=connection or "linear",
            architectures=[cls.__name__],
            dtype=models[0].dtype,
        )
        choose_attention(config, chosen_attention(models[0].config))
        with torch.device("meta"):
            fused = cls(config)
        fused._adopt(models)
        tied = fused.sub_models.all_tied_weights_keys
        fused.all_tied_weights_keys = {f"sub_models.{name}": f"sub_models.{tied[name]}" for name in tied}
        fused.generation_config = copy.deepcopy(models[-1].generation_config)
        return fused.train(models[0].training)

    def vote(self) -> list[float]:
        """What the logits of each sub-model's linear head are multiplied by."""
        return [w * logit_transform(m)[0] for w, m in zip(self.config.vote, self.sub_models, strict=True)]

    def get_decoder(self) -> MixedBackbone:
        return self._backbone[0]

    def get_input_embeddings(self) -> nn.Module:
        return self.sub_models[0].get_input_embeddings()

    def get_output_embeddings(self) -> MixedHead:
        return self.lm_head

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, S] (each sub-model embeds them itself, so there is no `inputs_embeds`); attention_mask
        [B, S + cached], 0 where padding. labels [B, S]: token ids (shifted here), -100 where there is nothing to learn.

        `loss`: the cross-entropy of the mixed logits, summed and divided by `num_items_in_batch` or by the number of
        valid labels. `logits` [B, S, V]; None in training when labels are given.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("a boosted model takes input_ids: its sub-models have different embeddings")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        out = self.get_decoder()(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
        )
        loss, logits = loss_and_logits(
            self, out.last_hidden_state, labels, num_items_in_batch, logits_to_keep, out.aux_loss
        )
        return CausalLMOutputWithPast(loss=loss, logits=logits, **cache_argument(out.cache))


AutoConfig.register(QwenBoostConfig.model_type, QwenBoostConfig)
AutoModelForCausalLM.register(QwenBoostConfig, QwenBoostForCausalLM)
