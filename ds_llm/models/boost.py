"""Boosted models: an ensemble of causal language models with one vocabulary, as one Hugging Face model.

Its logits are a vote of its sub-models': z = (1 - lambda) z_0 + lambda z_1, for more than two their mean. Each may also
see what its predecessor sees (`ds_llm.models.predecessor`). The vote of linear heads is itself one linear head, of the
concatenated hidden states, so loss and token statistics are computed from these as for any other model
(`ds_llm.models.head`). Weights are named `sub_models.{i}.` followed by the sub-model's own name. Importing this module
registers it with transformers' Auto classes.
"""

# no `from __future__ import annotations` here: the configuration's types are checked at run time
import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Self

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from ds_llm.compat.hf_model import CACHE, CausalModel, cache_argument, model_output, takes_cache
from ds_llm.compat.transformers import (
    CONFIG_MAPPING,
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
from ds_llm.models.head import (
    LMHead,
    attach_loss_head,
    backbone,
    balancing_loss,
    expert_figures,
    logit_transform,
    loss_and_logits,
)

OWN_KEYS = ("num_sub_models", "sub_model_cfgs", "fusion_lambda", "is_llmboost", "connection")


@strict
class QwenBoostConfig(PreTrainedConfig):
    """Configuration of a boosted model.

    num_sub_models (also read as `num_submodels`): how many; sub_model_cfgs: the configuration of each, as dictionaries
    with `model_type`; fusion_lambda: weight of the second of two; is_llmboost: each sees what its predecessor sees,
    `connection` says how (linear, gated). All five may also stand in a dictionary `ensemble_config`. Where
    `sub_model_cfgs` is missing, every sub-model has the architecture that the rest of the file describes.

    Raises ValueError (`huggingface_hub.errors.StrictDataclassError` where only a type is wrong) for what does not fit
    together.
    """

    model_type = "qwen_boost"
    has_no_defaults_at_init = True
    attribute_map = {"num_submodels": "num_sub_models"}  # noqa: RUF012 (transformers reads it from the class)
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012

    num_sub_models: int | None = None
    sub_model_cfgs: list[dict] | None = None
    fusion_lambda: float | int = 0.5
    is_llmboost: bool = False
    connection: str = "linear"

    def __post_init__(self, **kwargs):
        if not self.sub_model_cfgs:
            raise ValueError("a boosted model's configuration needs sub_model_cfgs")
        super().__post_init__(**kwargs)
        parts = [_sub_config(values) for values in self.sub_model_cfgs]
        texts = [part.get_text_config() for part in parts]
        self.sub_model_cfgs = [part.to_dict() for part in parts]
        self.num_sub_models = len(parts) if self.num_sub_models is None else self.num_sub_models
        self._check([text.vocab_size for text in texts])
        first = texts[0]
        self.vocab_size, self.hidden_size = first.vocab_size, first.hidden_size
        limits = [n for text in texts if (n := getattr(text, "max_position_embeddings", None))]
        self.max_position_embeddings = min(limits, default=None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name, None) is None:
                setattr(self, name, getattr(first, name, None))
        self.tie_word_embeddings = False  # a sub-model ties its own where its configuration says so
        self.use_cache = True
        # one cache holds the layers of all sub-models, one behind the other
        self.num_hidden_layers = sum(text.num_hidden_layers for text in texts)
        self.layer_types = [kind for text in texts for kind in _layer_types(text)]
        windows = {w for text in texts if (w := getattr(text, "sliding_window", None))}
        if len(windows) > 1:
            raise ValueError(f"sub_model_cfgs: attention windows differ ({', '.join(map(str, sorted(windows)))})")
        self.sliding_window = windows.pop() if windows else None

    def _check(self, vocabularies: list[int]) -> None:
        if self.num_sub_models != len(vocabularies) or self.num_sub_models < 2:
            raise ValueError(
                f"num_sub_models: {self.num_sub_models}, with {len(vocabularies)} sub_model_cfgs; it takes at least two"
            )
        if len(set(vocabularies)) > 1:
            raise ValueError(f"sub_model_cfgs: vocabularies differ ({', '.join(map(str, vocabularies))})")
        if not 0 <= self.fusion_lambda <= 1:
            raise ValueError(f"fusion_lambda: {self.fusion_lambda} is not between 0 and 1")
        if self.connection not in predecessor.CONNECTIONS:
            raise ValueError(f"connection: '{self.connection}' is not one of {', '.join(predecessor.CONNECTIONS)}")

    @property
    def vote(self) -> list[float]:
        """Weight of each sub-model's logits."""
        if self.num_sub_models == 2:
            return [1 - self.fusion_lambda, self.fusion_lambda]
        return [1 / self.num_sub_models] * self.num_sub_models

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        values = dict(config_dict)
        nested = values.pop("ensemble_config", None) or {}
        kind = values.pop("model_type", None)
        for name in OWN_KEYS:
            found = [d[key] for d in (values, nested) for key in (name, name.replace("sub_m", "subm")) if key in d]
            if found:
                values[name] = found[0]
        values.pop("num_submodels", None)
        if not values.get("sub_model_cfgs") and kind in CONFIG_MAPPING and kind != cls.model_type:
            rest = {k: v for k, v in values.items() if k not in (*OWN_KEYS, "architectures")}
            values["sub_model_cfgs"] = [{**rest, "model_type": kind}] * (values.get("num_sub_models") or 0)
        return super().from_dict(values, **kwargs)


def _sub_config(values: dict) -> PreTrainedConfig:
    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"sub_model_cfgs: model_type '{kind}' is not known to this version of transformers")
    config = CONFIG_MAPPING[kind].from_dict({k: v for k, v in values.items() if k != "model_type"})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"sub_model_cfgs: a '{kind}' model is not a causal language model")
    return config


def _layer_types(config: PreTrainedConfig) -> list[str]:
    """Kind of cache that each layer needs."""
    usual = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers


@model_output
class MixedOutput(ModelOutput):
    """`last_hidden_state` [B, S, sum of H_i]: those of the sub-models side by side. With experts, see `DecoderOutput`:
    `aux_loss` and `aux_report` of the sub-models that train, `expert_counts` of all layers."""

    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    aux_loss: Tensor | None = None
    aux_report: Tensor | None = None
    expert_counts: Tensor | None = None


class MixedHead(nn.Module):
    """The vote of the sub-models' output heads. It has no weights of its own."""

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
        """Whether all heads are plain: an adapter around one of them must be called."""
        return all(isinstance(head, LMHead) and head.bias is None for head in self.heads)

    def attach(self) -> None:
        """Prepare every sub-model's head, see `attach_loss_head`."""
        for part in self._model[0].sub_models:
            attach_loss_head(part)

    def forward(self, hidden: Tensor, labels: Tensor | None = None, reduction: str = "sum") -> Tensor | TokenStats:
        """As `LMHead.forward`, of hidden [..., sum of H_i]; labels only where `computes_loss`."""
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
    """The sub-models' backbones, run one after the other on the same tokens."""

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
            sub = _sub_config(values)
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
