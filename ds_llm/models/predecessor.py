"""Attention that also reads the inputs of a predecessor's attention (LLMBoost, arXiv:2512.22309).

Layer l of a successor computes q = h W_q + p W_prev instead of q = h W_q, where p is the normalised input of the
predecessor's attention in its layer l; k and v likewise. With gates the added term is multiplied by sigmoid(h w_gate),
one number per token. W_prev and w_gate start at 0, so a successor starts as the model it was.

The weights are named `self_attn.prev_{q,k,v}_proj` and `self_attn.prev_{q,k,v}_gate`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_llm.models.backbone import backbone

CONNECTIONS = ("linear", "gated")
STATES = "predecessor_states"  # keyword argument of the successor's backbone: a tensor [B, S, H] per layer
PROJECTIONS = ("q", "k", "v")


class Feed:
    """Holds the predecessor's input of one attention layer while its forward pass runs.

    It travels as a keyword argument through all layers. A layer that activation checkpointing runs again in the
    backward pass therefore gets it again.
    """

    hidden: Tensor | None = None

    def open(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states = kwargs.pop(STATES, None)
        self.hidden = None if states is None else states[attention.layer_idx]
        return args, kwargs

    def close(self, *_) -> None:
        self.hidden = None


class FedLinear(nn.Linear):
    """The q, k or v projection of a connected attention.

    It adds the projection of the predecessor's input, if there is one.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        out = super().forward(hidden)
        if self.feed.hidden is None:
            return out
        attention = self.attention[0]  # looked up each time: an adapter may have wrapped its layers
        added = getattr(attention, f"prev_{self.letter}_proj")(self.feed.hidden)
        gate = getattr(attention, f"prev_{self.letter}_gate", None)
        return out + (added if gate is None else torch.sigmoid(gate(hidden)) * added)


def connect(predecessor: nn.Module, successor: nn.Module, connection: str) -> None:
    """Add the connection's weights to the attention layers of `successor`. Both are causal language models.

    Raises `ValueError` unless both have equally many layers with q_proj, k_proj, v_proj and an input_layernorm.
    """
    if connection not in CONNECTIONS:
        raise ValueError(f"connection '{connection}': must be one of {', '.join(CONNECTIONS)}")
    before, after = _layers(predecessor), _layers(successor)
    if len(before) != len(after):
        raise ValueError(f"a model of {len(after)} layers cannot be fed by one of {len(before)}")
    for source, layer in zip(before, after, strict=True):
        attention, feed = layer.self_attn, Feed()
        width = source.self_attn.q_proj.in_features
        for letter in PROJECTIONS:
            linear = getattr(attention, f"{letter}_proj")
            place = {"device": linear.weight.device, "dtype": linear.weight.dtype, "bias": False}
            setattr(attention, f"prev_{letter}_proj", nn.Linear(width, linear.out_features, **place))
            if connection == "gated":
                setattr(attention, f"prev_{letter}_gate", nn.Linear(linear.in_features, 1, **place))
            linear.__class__ = FedLinear
            linear.feed, linear.letter = feed, letter
            linear.attention = (attention,)  # in a tuple: not a child of its own child
        attention.register_forward_pre_hook(feed.open, with_kwargs=True)
        attention.register_forward_hook(feed.close, always_call=True)
    reset(successor)


@torch.no_grad()
def reset(successor: nn.Module) -> None:
    """Set the connection's weights of a successor to 0."""
    for name, parameter in successor.named_parameters():
        if is_connection(name):
            nn.init.zeros_(parameter)


def is_connection(name: str) -> bool:
    """Whether the parameter of this name belongs to a connection."""
    return ".self_attn.prev_" in f".{name}"


def attention_inputs(model: nn.Module, hidden_states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs of each layer's attention, computed from the `hidden_states` that the model's backbone returned."""
    layers = _layers(model)
    return tuple(layer.input_layernorm(h) for layer, h in zip(layers, hidden_states[: len(layers)], strict=True))


def _layers(model: nn.Module) -> nn.ModuleList:
    layers = getattr(backbone(model), "layers", None)
    needed = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "input_layernorm")
    try:
        if not layers:
            raise AttributeError
        for name in needed:
            layers[0].get_submodule(name)
    except AttributeError:
        kind = model.config.model_type
        raise ValueError(f"a '{kind}' model cannot be connected: its layers lack one of {', '.join(needed)}") from None
    return layers
