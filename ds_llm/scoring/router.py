"""Metrics of a mixture of experts: the routing of a sample, and the scores of its quality gates."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ds_llm.errors import UserError
from ds_llm.scoring.metrics import Batch, Metric, number, register

EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")  # names that configurations have for their number


@register
class Router(Metric):
    """`router` float16 [layers, experts]: mean probability that each layer's gate gives to each expert, over all tokens
    of the sample; `routing_entropy`: mean entropy in nats of these probabilities, over tokens and layers."""

    name = "router"
    statistics = False
    options: ClassVar[dict] = {"output_router_logits": True}
    arrays = ("router",)

    def __init__(self, config):
        super().__init__(config)
        text = config.get_text_config()
        if not any(getattr(text, name, None) for name in EXPERTS) or getattr(text, "use_moe", True) is False:
            raise UserError(f"metric 'router': a '{config.model_type}' model has no experts")
        self.sigmoid = getattr(text, "scoring_func", "softmax") == "sigmoid"

    def columns(self) -> dict[str, pa.DataType]:
        return {"routing_entropy": pa.float64()}

    def measure(self, batch: Batch, unconditional: Batch | None) -> dict:
        features, entropies = [], []
        for logits in batch.output.router_logits:
            shares = self._shares(logits.flatten(0, -2).float())
            features.append(batch.token_mean(shares))
            entropies.append(batch.token_mean(torch.special.entr(shares).sum(-1)))
        features = torch.stack(features, 1).cpu().numpy()
        features[~np.isfinite(features)] = np.nan
        entropies = torch.stack(entropies, 1).mean(1).tolist()
        return {
            "router": features.astype(np.float16),
            "routing_entropy": [number(value) for value in entropies],
        }

    def _shares(self, logits: Tensor) -> Tensor:
        """Probabilities of the experts; of sigmoid scores their shares of the sum."""
        if not self.sigmoid:
            return logits.softmax(-1)
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True)


@register
class Quality(Metric):
    """Mean of the quality gates' g = sigmoid(score) over all tokens of the sample, then over the layers that have one:
    in [0, 1], high where the model trusts its experts. See `ds_llm.models.quality_gate`."""

    name = "quality"
    statistics = False
    options: ClassVar[dict] = {"output_quality_scores": True}

    def __init__(self, config):
        super().__init__(config)
        if config.model_type != "select_moe":
            raise UserError(
                f"metric 'quality': a '{config.model_type}' model has no quality gates; give it some with "
                "launch/convert.py select-moe, or choose another score"
            )

    def measure(self, batch: Batch, unconditional: Batch | None) -> dict[str, list]:
        scores = [layer.flatten(0, 1).double() for layer in batch.output.quality_scores]
        layers = [batch.token_mean(layer.sigmoid())[:, 0] for layer in scores]
        return {"quality": [number(value) for value in torch.stack(layers, 1).mean(1).tolist()]}
