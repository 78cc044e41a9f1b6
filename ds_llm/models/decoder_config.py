"""Configuration of the project's decoder."""

# no `from __future__ import annotations` here: the types are checked at run time
import math
from typing import Self

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import PreTrainedConfig

from ds_llm.compat.hf_model import CACHE
from ds_llm.compat.transformers import ROPE_INIT_FUNCTIONS
from ds_llm.config.sections import ModelConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@strict
class DecoderConfig(PreTrainedConfig):
    """Configuration of the decoder; names are those of transformers, see docs/model.md for each field.

    Raises `huggingface_hub.errors.StrictDataclassError` for a wrong type, or heads, experts or rotary options that do
    not fit together.
    """

    model_type = "ds_llm_decoder"
    keys_to_ignore_at_inference = [CACHE, "aux_loss", "aux_report", "expert_counts"]  # noqa: RUF012
    base_model_tp_plan = {  # noqa: RUF012
        **{f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
        **{f"layers.*.mlp.{name}_proj": "colwise" for name in ("gate", "up")},
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 6400
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 512
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    use_cache: bool = True
    use_moe: bool = False
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 0
    moe_intermediate_size: int | None = None
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    aux_loss_alpha: float | int = 0.01
    seq_aux: bool = True
    z_loss_alpha: float | int = 0.0
    first_k_dense_replace: int = 0
    router_bias_speed: float | int = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = swiglu_width(self.hidden_size, 64)
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.layer_types is None:
            kind = "sliding_attention" if self.sliding_window else "full_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    def window_of(self, layer: int) -> int | None:
        """Tokens that a token of this layer sees, its own among them; None: all before it."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    def rope(self) -> tuple[Tensor | None, float]:
        """Scaled rotary frequencies, float32 [head_dim / 2], and the factor of cosines and sines.

        Computed by transformers' functions; without a scaling (None, 1.0).
        """
        kind = self.rope_parameters["rope_type"]
        if kind == "default":
            return None, 1.0
        with torch.device("cpu"):  # a model may be built on the meta device, which holds no values
            frequencies, scale = ROPE_INIT_FUNCTIONS[kind](self, torch.device("cpu"))
        return frequencies, float(scale)

    def validate_architecture(self):
        """Called by the base class after construction."""
        if self.hidden_size % self.num_attention_heads and self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}")
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ValueError(f"rope_type '{kind}' is not one of {', '.join(ROPE_TYPES)}")
        if kind != "default":
            try:
                self.rope()
            except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
                raise ValueError(f"rope_type '{kind}': a value is missing or wrong: {error}") from None
        if len(self.layer_types) < self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers")
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise ValueError("layer_types has sliding_attention, which needs a sliding_window")
        if self.use_moe and self.first_k_dense_replace >= self.num_hidden_layers:
            raise ValueError(f"first_k_dense_replace {self.first_k_dense_replace} leaves no layer for the experts")
        if self.use_moe and self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than n_routed_experts {self.n_routed_experts}"
            )
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring_func must be softmax or sigmoid, not '{self.scoring_func}'")

    @classmethod
    def from_model_config(cls, model: ModelConfig, vocab_size: int, **kwargs) -> Self:
        """From the `model` section of a run's configuration; `kwargs` are further fields (token ids)."""
        return cls(
            vocab_size=vocab_size,
            hidden_size=model.dim,
            num_hidden_layers=model.n_layers,
            num_attention_heads=model.n_heads,
            num_key_value_heads=model.n_kv_heads,
            intermediate_size=model.intermediate_size or swiglu_width(model.dim, model.multiple_of),
            max_position_embeddings=model.max_seq_len,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta, **(model.rope_scaling or {})},
            qk_norm=model.qk_norm,
            sliding_window=model.sliding_window,
            layer_types=layer_types(model),
            first_k_dense_replace=model.first_dense_layers,
            router_bias_speed=model.router_bias_speed,
            rms_norm_eps=model.norm_eps,
            tie_word_embeddings=model.tie_embeddings,
            dropout=model.dropout,
            use_moe=model.use_moe,
            n_routed_experts=model.n_routed_experts,
            num_experts_per_tok=model.num_experts_per_tok,
            n_shared_experts=model.n_shared_experts,
            moe_intermediate_size=model.moe_intermediate_size,
            scoring_func=model.scoring_func,
            norm_topk_prob=model.norm_topk_prob,
            aux_loss_alpha=model.aux_loss_alpha,
            seq_aux=model.seq_aux,
            z_loss_alpha=model.z_loss_alpha,
            **kwargs,
        )


def swiglu_width(hidden_size: int, multiple_of: int) -> int:
    """8/3 of the hidden size, rounded up: three SwiGLU matrices of it hold what two of a 4x wide MLP hold."""
    return math.ceil(8 * hidden_size / 3 / multiple_of) * multiple_of


def layer_types(model: ModelConfig) -> list[str]:
    """The kind of attention of each layer: every `full_attention_every`-th of a model with a window sees all tokens."""
    every = model.full_attention_every
    whole = [not model.sliding_window or bool(every and (i + 1) % every == 0) for i in range(model.n_layers)]
    return ["full_attention" if full else "sliding_attention" for full in whole]
