"""Adapters that are merged into weights when these are read, one weight at a time."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from ds_llm.compat.peft import adapted_layers
from ds_llm.compat.torch import swap_parameter
from ds_llm.models.deferred import Deferred, settle, whole


def merge_when_read(model: nn.Module) -> None:
    """Make the adapted weights of a peft model deferred ones with the adapters merged; `merge_and_unload` then unloads.

    Layers that share their weight with others, or adapt more than a weight, are settled, and left for
    `merge_and_unload` to merge.
    """
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for layer, biased in adapted_layers(model):
        base = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        if isinstance(base, nn.Linear) and not biased and places[id(weight)] == 1:
            outline = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            merged = Deferred(outline, _Merged(layer, weight.detach(), list(layer.active_adapters)))
            base.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)
            layer.merged_adapters.extend(layer.active_adapters)
        else:
            settle(model, only=list(base.parameters()))


class _Merged:
    """Computes a weight as the layer's own `merge` does."""

    def __init__(self, layer: nn.Module, weight: Tensor, adapters: list[str]):
        self.layer, self.weight, self.adapters = layer, weight, adapters

    @torch.no_grad()
    def __call__(self) -> Tensor:
        base = self.layer.get_base_layer()
        held = swap_parameter(base, "weight", nn.Parameter(whole(self.weight).clone(), requires_grad=False))
        merged = self.layer.merged_adapters
        self.layer.merged_adapters = []
        try:
            self.layer.merge(adapter_names=self.adapters)
            return base.weight.detach()
        finally:
            swap_parameter(base, "weight", held)
            self.layer.merged_adapters = merged
