"""Select-MoE: a mixture-of-experts language model with quality gates in its blocks (`ds_llm.models.quality_gate`).

Backbone and output head are those of the base model (OLMoE, Qwen3-MoE, Mixtral, the project's decoder), under the same
names, so its weight files are also this model's. The gates are named `model.layers.{i}.mlp.quality_gate.weight`.
Importing this module registers the model with transformers' Auto classes.
"""

# no `from __future__ import annotations` here: the configuration's types are checked at run time
import dataclasses

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig

from ds_llm.compat.hf_model import CACHE, CausalModel, cache_argument, model_output, takes_cache

# `ds_llm.models.head.balancing_loss` takes it from the module of the model's class, as from those of transformers
from ds_llm.compat.transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    Cache,
    ModelOutput,
    can_return_tuple,
    load_balancing_loss_func,  # noqa: F401
)
from ds_llm.compat.transformers import initialization as init
from ds_llm.errors import UserError
from ds_llm.models.head import LMHead, balancing_loss, loss_and_logits
from ds_llm.models.quality_gate import OPTION, QualityGate, add_gates
from ds_llm.models.quality_loss import QualityOptions, batch_loss, describe, power_sums

BALANCE_KEYS = ("aux_loss_alpha", "router_aux_loss_coef")  # names that configurations have for the balance weight


@strict
class SelectMoeConfig(PreTrainedConfig):
    """Configuration of a Select-MoE model.

    text_config: that of the model it was made of, with its `model_type`; the weight of the load-balancing loss is its
    (`aux_loss_alpha`, `router_aux_loss_coef`). trash_expert: zero, noise or a registered one. quality_gate_init_mean,
    _std: gates that are in no file are drawn from N(mean, std). quality_loss_weight, quality_loss_type: of the loss on
    the gates, see `ds_llm.models.quality_loss`; the next five are that module's `QualityOptions`. quality_loss_debug:
    print the terms of every loss computed.

    Raises ValueError where text_config is missing or of an unknown model.
    """

    model_type = "select_moe"
    has_no_defaults_at_init = True
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (transformers reads it from the class)
    keys_to_ignore_at_inference = [  # noqa: RUF012
        CACHE,
        "aux_loss",
        "quality_loss",
        "quality_scores",
        "router_logits",
    ]

    text_config: dict | PreTrainedConfig | None = None
    trash_expert: str = "zero"
    quality_gate_init_mean: float | int = 0.0
    quality_gate_init_std: float | int = 0.02
    quality_loss_weight: float | int = 0.01
    quality_loss_type: str = "sigmoid"
    beta_target_mean: float | int = 0.5
    beta_target_var: float | int = 0.05
    w_mean: float | int = 1.0
    w_var: float | int = 1.0
    lambda_var: float | int = 0.1
    quality_loss_debug: bool = False

    def __post_init__(self, **kwargs):
        values = self.text_config
        if isinstance(values, dict):
            kind = values.get("model_type")
            if kind not in CONFIG_MAPPING:
                raise ValueError(f"text_config: model_type '{kind}' is not known to this version of transformers")
            self.text_config = CONFIG_MAPPING[kind].from_dict({k: v for k, v in values.items() if k != "model_type"})
        if self.text_config is None:
            raise ValueError("a Select-MoE model's configuration needs text_config")
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name, None) is None:
                setattr(self, name, getattr(self.text_config, name, None))

    @property
    def max_position_embeddings(self) -> int | None:
        return getattr(self.text_config, "max_position_embeddings", None)

    @property
    def load_balancing_weight(self) -> float | None:
        """What the load-balancing loss is multiplied by, once; None for a backbone without such a loss."""
        return next((v for key in BALANCE_KEYS if (v := getattr(self.text_config, key, None)) is not None), None)

    def set_load_balancing_weight(self, weight: float) -> None:
        """Set the weight in the configuration.

        It takes effect in backbones that are built afterwards, and in those that read the configuration in each forward
        pass.
        """
        for key in BALANCE_KEYS:
            if getattr(self.text_config, key, None) is not None:
                setattr(self.text_config, key, weight)

    def quality_options(self) -> QualityOptions:
        return QualityOptions(**{f.name: getattr(self, f.name) for f in dataclasses.fields(QualityOptions)})


@model_output
class SelectMoeOutput(ModelOutput):
    """Output of `SelectMoeForCausalLM`.

    `logits` [B, S, V], None in training when labels are given. On request per layer with experts: `quality_scores`
    [B, S, 1], before the sigmoid, and `router_logits` [B * S, E]. In training, when labels are given: `aux_loss`, the
    load-balancing loss times its weight, and `quality_loss`, without its weight.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    quality_scores: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    quality_loss: Tensor | None = None


class SelectMoeForCausalLM(CausalModel, GenerationMixin, tied={"lm_head.weight": "model.embed_tokens.weight"}):
    config_class = SelectMoeConfig
    base_model_prefix = "model"

    def __init__(self, config: SelectMoeConfig):
        super().__init__(config)
        text = config.text_config
        self.model = MODEL_MAPPING[type(text)](text)
        if not add_gates(self.model, text.hidden_size, config.trash_expert):
            raise UserError(f"a '{text.model_type}' model has no experts that could be gated")
        self.lm_head = LMHead(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self):
        """Called by transformers; what a file has given is marked and stays."""
        for gate in self.model.modules():
            if isinstance(gate, QualityGate):
                init.normal_(gate.weight, self.config.quality_gate_init_mean, self.config.quality_gate_init_std)
        super().initialize_weights()

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
    ) -> SelectMoeOutput:
        """Arguments as for any transformers decoder; `output_quality_scores`, `output_router_logits` on request.

        labels [B, S]: token ids (shifted here), -100 where there is nothing to learn. `loss`: cross-entropy summed and
        divided by `num_items_in_batch` or by the number of valid labels; in training plus the load-balancing loss and
        `quality_loss_weight` times the quality loss of this batch, both over tokens that are no padding.
        """
        learning = labels is not None and self.training
        balanced = balancing_loss(self) if learning else None
        asked = {name: kwargs.get(f"output_{name}") for name in ("router_logits", "quality_scores")}
        if balanced is not None:
            kwargs["output_router_logits"] = True
        if learning and self.config.quality_loss_weight:
            kwargs[OPTION] = True
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **cache_argument(cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        aux = quality = None
        if learning:
            aux = out.get("aux_loss") if balanced is None else balanced(out.router_logits, attention_mask)[0]
        loss, logits = loss_and_logits(self, out.last_hidden_state, labels, num_items_in_batch, logits_to_keep, aux)
        if learning and kwargs.get(OPTION):
            quality = self._quality_loss(out.quality_scores, attention_mask)
            loss = loss + self.config.quality_loss_weight * quality
        return SelectMoeOutput(
            loss=loss,
            logits=logits,
            **cache_argument(out.get(CACHE)),
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            aux_loss=aux,
            quality_loss=quality,
            **{name: out.get(name) if wanted else None for name, wanted in asked.items()},
        )

    def _quality_loss(self, scores: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        name, options = self.config.quality_loss_type, self.config.quality_options()
        mask = None if mask is None else mask[:, -scores[0].shape[1] :]
        loss, terms = batch_loss(name, scores, mask, options)
        if self.config.quality_loss_debug:
            tokens = scores[0][..., 0].numel() if mask is None else mask.sum()
            print(describe(name, power_sums(scores, mask).detach() / tokens, terms), flush=True)
        return loss


AutoConfig.register(SelectMoeConfig.model_type, SelectMoeConfig)
AutoModelForCausalLM.register(SelectMoeConfig, SelectMoeForCausalLM)
