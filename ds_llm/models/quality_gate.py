"""Quality gates: one scalar per token and mixture-of-experts block, which weighs the experts' output.

A gate is a linear layer without bias on the normalised hidden state x that the experts read: s = w x, g = sigmoid(s).
The block's output becomes y = g MoE(x) + (1 - g) trash(x).

`add_gates` puts a gate into every block of a backbone, the project's decoder or a model of transformers. It replaces
the block's class by a subclass of the same name. Parameters keep their names, and code that goes by the class name
(ZeRO-3, kernels, recorders of router logits) still finds the block.

A backbone with gates takes `output_quality_scores=True`, beside `output_router_logits=True`. Its output then has
`quality_scores`, a tuple with s of each block, [batch, seq, 1] float32, and `router_logits`, a tuple of
[batch * seq, experts].
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_llm.errors import UserError

OPTION = "output_quality_scores"
# classes of blocks that take a normalised hidden state [B, S, H] and return the experts' output, alone or first
BLOCKS = (
    "MoEBlock",
    "MixtralSparseMoeBlock",
    "OlmoeSparseMoeBlock",
    "Qwen2MoeSparseMoeBlock",
    "Qwen3MoeSparseMoeBlock",
)
# (scores of the forward pass under way or None where nobody asked for them, the same of the pass around it)
_recording: ContextVar[tuple | None] = ContextVar("quality_scores", default=None)


@lru_cache(maxsize=256)
def _pattern(size: int, seed: int) -> Tensor:
    """A fixed vector [size] of mean 0 and standard deviation 1."""
    noise = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((noise - noise.mean()) / noise.std(correction=0)).float()


class Noise(nn.Module):
    """Gaussian noise with each token's own mean and standard deviation, [..., H] -> [..., H].

    In training every token gets fresh noise. In evaluation all tokens get one pattern, a function of `seed` alone. A
    token then gives the same output in any batch, with a cache and without.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def forward(self, hidden: Tensor) -> Tensor:
        mean, std = hidden.mean(-1, keepdim=True), hidden.std(-1, keepdim=True, correction=0)
        pattern = torch.randn_like(hidden) if self.training else _pattern(hidden.shape[-1], self.seed).to(hidden)
        return mean + std * pattern


TRASH: dict[str, Callable[[int, int], nn.Module | None]] = {
    "zero": lambda hidden_size, layer: None,
    "noise": lambda hidden_size, layer: Noise(layer),
}


def register_trash(name: str) -> Callable:
    """Decorator that registers a trash expert under a name.

    It decorates a function (hidden size, layer index) -> nn.Module, which maps hidden states [B, S, H] to [B, S, H].
    The module's parameters are trained and saved with the gate.
    """

    def register(factory: Callable[[int, int], nn.Module]) -> Callable:
        TRASH[name] = factory
        return factory

    return register


class QualityGate(nn.Module):
    """Weighs the experts' output of each token against a trash expert's.

    hidden_size: of the tokens; trash: name under `TRASH` ("zero", "noise" or a registered one); layer: index of the
    gate, which a trash expert may use. `weight` [1, hidden_size]; scores are computed in float32 (float64 for float64).
    Raises `UserError` for an unknown trash expert.
    """

    def __init__(self, hidden_size: int, trash: str = "zero", layer: int = 0):
        super().__init__()
        if trash not in TRASH:
            near = difflib.get_close_matches(trash, TRASH, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"trash expert '{trash}': must be one of {', '.join(TRASH)}{hint}")
        self.weight = nn.Parameter(torch.empty(1, hidden_size))
        self.trash = TRASH[trash](hidden_size, layer)
        self.forced_open = False
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, mean: float = 0.0, std: float = 0.02) -> None:
        """Draw the gate's weight from N(mean, std)."""
        self.weight.normal_(mean, std)

    def quality_score(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> scores [..., 1] before the sigmoid."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(dtype), self.weight.to(dtype))

    def forward(self, hidden: Tensor, experts: Tensor) -> Tensor:
        """hidden: what the experts saw, experts: what they made of it, both [B, S, H] -> the block's output."""
        score = self.quality_score(hidden)
        found = _recording.get()
        if found is not None and found[0] is not None:
            found[0].append(score)
        good = torch.ones_like(score) if self.forced_open else torch.sigmoid(score)
        out = good.to(experts.dtype) * experts
        if self.trash is not None:
            out = out + (1 - good).to(experts.dtype) * self.trash(hidden)
        return out


@cache
def _gated(block: type) -> type:
    """The class of a block that passes its experts' output through its `quality_gate`."""

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        out = block.forward(self, hidden_states, *args, **kwargs)
        if isinstance(out, tuple):
            return self.quality_gate(hidden_states, out[0]), *out[1:]
        return self.quality_gate(hidden_states, out)

    return type(
        block.__name__, (block,), {"forward": forward, "__doc__": block.__doc__, "__module__": block.__module__}
    )


def add_gates(body: nn.Module, hidden_size: int, trash: str = "zero") -> int:
    """Put a gate into every mixture-of-experts block of a backbone, in place; returns how many there are.

    The backbone then takes `output_quality_scores`.
    """
    blocks = [m for m in body.modules() if type(m).__name__ in BLOCKS]
    for i, block in enumerate(blocks):
        block.quality_gate = QualityGate(hidden_size, trash, i)
        block.__class__ = _gated(type(block))
    body.register_forward_pre_hook(_start_recording, with_kwargs=True)
    body.register_forward_hook(_finish_recording, always_call=True)
    return len(blocks)


def _start_recording(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    outer = _recording.get()
    _recording.set(([] if kwargs.pop(OPTION, False) else outer and outer[0], outer))
    return args, kwargs


def _finish_recording(_, __, output):
    scores, outer = _recording.get()
    _recording.set(outer)
    own = scores is not None and (outer is None or scores is not outer[0])
    if own and output is not None:
        output["quality_scores"] = tuple(scores)
    return output


@contextmanager
def record_scores() -> Iterator[list[Tensor]]:
    """Context manager that appends the scores of all gates to the list.

    A forward pass that asks for scores keeps its own.
    """
    scores: list[Tensor] = []
    outer = _recording.get()
    _recording.set((scores, outer))
    try:
        yield scores
    finally:
        _recording.set(outer)


def gates(model: nn.Module) -> list[QualityGate]:
    """All gates of a model, from the first layer to the last."""
    return [module for module in model.modules() if isinstance(module, QualityGate)]


@contextmanager
def open_gates(model: nn.Module) -> Iterator[None]:
    """Inside the block every gate lets its experts through: g = 1, whatever its score."""
    found = gates(model)
    for gate in found:
        gate.forced_open = True
    try:
        yield
    finally:
        for gate in found:
            gate.forced_open = False
