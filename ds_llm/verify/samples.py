"""Random documents for proofs, as rows for training and as plain torch computes them alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_llm.models.head import IGNORE_INDEX
from ds_llm.models.isolation import TOLERANCE
from ds_llm.verify.subject import SEED

OUTPUTS, GRADIENTS = TOLERANCE[torch.float32]  # what rounding may change, relative to the largest value
# tokens of the documents of two rows of equal length: many or one, longer and shorter than a window
PACKED = ((3, 7, 5, 1, 2, 6), (24,))
WHOLE = ((24,), (24,))  # for models that cannot pack


def documents(tokens: int, packed: bool = True) -> list[list[Tensor]]:
    """Documents of each row: int64 tokens [n] from 2 on; 1 ends and pads in small models."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = PACKED if packed else WHOLE
    return [[torch.randint(2, tokens, (n,), generator=generator) for n in row] for row in lengths]


def vocabulary(model: nn.Module) -> int:
    """Number of the tokens that a model both reads and predicts."""
    return min(model.get_input_embeddings().num_embeddings, model.get_output_embeddings().out_features)


def batch_of(rows: list[list[Tensor]]) -> dict[str, Tensor]:
    """A micro-batch as training has it, tensors [B, S]; positions restart with each document."""
    after = torch.tensor([IGNORE_INDEX])
    parts = {
        "input_ids": rows,
        "labels": [[torch.cat([ids[1:], after]) for ids in row] for row in rows],
        "position_ids": [[torch.arange(len(ids)) for ids in row] for row in rows],
    }
    return {name: torch.stack([torch.cat(row) for row in values]) for name, values in parts.items()}


def trained(rows: list[list[Tensor]]) -> list[Tensor]:
    """The documents in which something is predicted."""
    return [ids for row in rows for ids in row if len(ids) > 1]


def plain_loss(model: nn.Module, found: list[Tensor]) -> Tensor:
    """Summed cross-entropy of documents by the library's own forward pass, each alone."""
    losses = []
    for ids in found:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, ids[1:], reduction="sum"))
    return torch.stack(losses).sum()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss by parameter; those that it does not reach are left out."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference, relative to the largest expected value; infinity where there is none."""
    return number(float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)))


def number(value: float) -> float:
    """The difference as a number that can be compared: NaN becomes infinity."""
    return math.inf if math.isnan(value) else value


def gradient_difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[str, float]:
    """The parameter whose gradients differ most, and the difference relative to its largest gradient."""
    # a bias that does not change a softmax has a gradient of rounding alone
    largest = max(float(value.abs().max()) for value in expected.values())
    worst = ("", 0.0)
    for name in expected.keys() | found.keys():
        some = expected.get(name, found.get(name))
        one, other = (values.get(name, torch.zeros_like(some)) for values in (expected, found))
        size = one.abs().max().clamp_min(max(0.01 * largest, 1e-12))
        value = number(float((other - one).abs().max() / size))
        if value > worst[1]:
            worst = (name, value)
    return worst
