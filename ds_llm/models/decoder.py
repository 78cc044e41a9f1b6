"""The project's decoder: a Llama-style language model with optional mixture-of-experts layers, usable by transformers.

RMSNorm before each block (Zhang & Sennrich, arXiv:1910.07467), rotary positions (Su et al., arXiv:2104.09864), grouped
query attention (Ainslie et al., arXiv:2305.13245), SwiGLU. Without experts its parameters, names and outputs are those
of transformers' Llama. Importing this module registers it with transformers' Auto classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, GenerationMixin

from ds_llm.compat.hf_model import CausalModel, cache_argument, model_output, takes_cache
from ds_llm.compat.transformers import (
    ALL_ATTENTION_FUNCTIONS,
    Cache,
    GradientCheckpointingLayer,
    ModelOutput,
    can_return_tuple,
    capture_outputs,
    chosen_attention,
    create_causal_mask,
    create_sliding_window_causal_mask,
    eager_attention_forward,
)
from ds_llm.compat.transformers import initialization as init
from ds_llm.kernels.rope import apply_rope, rope_tables
from ds_llm.models.decoder_config import DecoderConfig
from ds_llm.models.documents import Documents
from ds_llm.models.head import LMHead, loss_and_logits
from ds_llm.models.moe import MLP, Experts, MoEBlock, Router


@model_output
class DecoderOutput(ModelOutput):
    """Output of `DecoderModel`.

    `last_hidden_state` [B, S, H]. With experts: `aux_loss`, the auxiliary losses weighted and summed over layers;
    `aux_report`, the load-balancing loss without its weight, mean over layers (1 when uniform); `expert_counts`
    [layers, E] int32, how often each expert was chosen; `router_logits` (on request), [B * S, E] per layer.
    """

    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    aux_report: Tensor | None = None
    expert_counts: Tensor | None = None


@model_output
class DecoderCausalLMOutput(ModelOutput):
    """Output of `DecoderForCausalLM`; `logits` [B, S, V], None in training when labels are given."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    aux_report: Tensor | None = None
    expert_counts: Tensor | None = None


class DecoderAttention(nn.Module):
    """Causal grouped query attention with rotary positions."""

    is_causal = True

    def __init__(self, config: DecoderConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.o_proj.into_residual = True
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.sliding_window = config.window_of(layer_idx)

    def forward(self, hidden, rope, attention_mask=None, cache=None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """hidden [B, S, H], rope = (cos, sin) [S or B x S, head_dim / 2] -> output [B, S, H], attention weights."""
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        q, k = self.q_norm(self.q_proj(hidden).view(shape)), self.k_norm(self.k_proj(hidden).view(shape))
        q, k = apply_rope(q, k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), self.v_proj(hidden).view(shape).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(chosen_attention(self.config), eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        kwargs |= {"dropout": dropout, "scaling": self.scaling, "sliding_window": self.sliding_window}
        out, weights = attend(self, q, k, v, attention_mask, **kwargs)
        return self.o_proj(out.reshape(*hidden.shape[:-1], -1)), weights


class DecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP (or experts), each behind a norm and added to its input."""

    def __init__(self, config: DecoderConfig, layer_idx: int):
        super().__init__()
        self.dropout = config.dropout
        self.self_attn = DecoderAttention(config, layer_idx)
        experts = config.use_moe and layer_idx >= config.first_k_dense_replace
        self.mlp = MoEBlock(config) if experts else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @takes_cache
    def forward(self, hidden, rope, attention_mask=None, cache=None, token_mask=None, **kwargs):
        """Returns (hidden [B, S, H],), followed by what `MoEBlock` returns beside its output."""
        out, _ = self.self_attn(self.input_layernorm(hidden), rope, attention_mask, cache, **kwargs)
        hidden = hidden + F.dropout(out, self.dropout, self.training)
        normed = self.post_attention_layernorm(hidden)
        if isinstance(self.mlp, MoEBlock):
            out, *rest = self.mlp(normed, token_mask, kwargs.get("shard"))
        else:
            out, rest = self.mlp(normed), ()
        return hidden + F.dropout(out, self.dropout, self.training), *rest


class DecoderPreTrainedModel(
    CausalModel,
    records={"hidden_states": (DecoderLayer, 0), "attentions": (DecoderAttention, 1), "router_logits": (Router, 0)},
):
    config_class = DecoderConfig
    base_model_prefix = "model"
    _no_split_modules = ("DecoderLayer",)

    @torch.no_grad()
    def _init_weights(self, module):
        """N(0, initializer_range); projections into the residual stream by 1/sqrt(2 layers) less (GPT-2).

        Such a linear layer carries the mark `into_residual`: transformers passes over modules outside its own package
        that hold no parameter themselves, so it is not their owner that can be asked.
        """
        super()._init_weights(module)
        std = self.config.initializer_range
        into_residual = std / math.sqrt(2 * self.config.num_hidden_layers)
        if isinstance(module, Router):
            init.normal_(module.weight, std=std)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=into_residual)
        elif getattr(module, "into_residual", False):
            init.normal_(module.weight, std=into_residual)


class DecoderModel(DecoderPreTrainedModel):
    """The decoder without its output head."""

    takes_token_mask = True

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        # no padding_idx: where the padding token is also the end of text, its embedding must learn
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rope_frequencies, self.rope_scale = config.rope()
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        token_mask: Tensor | None = None,
        **kwargs,
    ) -> DecoderOutput:
        """input_ids [B, S] or inputs_embeds [B, S, H]; attention_mask [B, S + cached], 0 where padding.

        token_mask [B, S] bool, False where a token takes no part in routing; none: where the attention mask is 0.

        position_ids [B, S] that restart at 0 within a row, without an attention mask and a cache, mean packed
        documents: attention does not cross a restart. Without position_ids, tokens follow those in the cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = hidden.shape[:2]
        # made from the caller's cache: transformers looks for packed documents only where there is no cache
        make = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        masks = {
            kind: make[kind](
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **cache_argument(cache),
            )
            for kind in set(self.config.layer_types)
        }
        flash = "flash" in (chosen_attention(self.config) or "") and "cu_seq_lens_q" not in kwargs
        if flash and position_ids is not None and attention_mask is None and cache is None:
            documents = Documents.of(position_ids.expand(batch, -1))
            kwargs |= documents.arguments() if documents else {}
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(length, device=hidden.device) + seen
        else:
            positions = position_ids[0] if position_ids.shape[0] == 1 else position_ids
        theta = self.config.rope_parameters["rope_theta"]
        rope = rope_tables(positions, self.config.head_dim, theta, frequencies=self.rope_frequencies)
        rope = [table * self.rope_scale for table in rope] if self.rope_scale != 1 else rope
        if token_mask is None and self.config.use_moe and attention_mask is not None and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -length:].bool()

        stats = []
        for layer, kind in zip(self.layers, self.config.layer_types, strict=False):
            mask = masks[kind]
            hidden, *rest = layer(
                hidden, rope, attention_mask=mask, token_mask=token_mask, **cache_argument(cache), **kwargs
            )
            stats += [rest] if rest else []
        out = DecoderOutput(last_hidden_state=self.norm(hidden), **cache_argument(cache))
        if stats:
            aux, balance, counts = (torch.stack(column) for column in zip(*stats, strict=True))
            out.aux_loss, out.aux_report, out.expert_counts = aux.sum(), balance.mean(), counts
        return out


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin, tied={"lm_head.weight": "model.embed_tokens.weight"}):
    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.model = DecoderModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
    ) -> DecoderCausalLMOutput:
        """See `DecoderModel.forward`. labels [B, S]: token ids (shifted here), -100 where there is nothing to learn.

        `loss`: summed cross-entropy divided by `num_items_in_batch` or by the number of valid labels, computed in
        chunks; in training the auxiliary losses are added. `logits_to_keep`: only the last so many positions, or the
        positions of an index tensor; 0 for all.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        loss, logits = loss_and_logits(
            self, out.last_hidden_state, labels, num_items_in_batch, logits_to_keep, out.aux_loss
        )
        return DecoderCausalLMOutput(
            loss=loss,
            logits=logits,
            **cache_argument(out.cache),
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            router_logits=out.router_logits,
            aux_loss=out.aux_loss,
            aux_report=out.aux_report,
            expert_counts=out.expert_counts,
        )


AutoConfig.register(DecoderConfig.model_type, DecoderConfig)
AutoModel.register(DecoderConfig, DecoderModel)
AutoModelForCausalLM.register(DecoderConfig, DecoderForCausalLM)
