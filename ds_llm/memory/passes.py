"""Memory of a forward and backward pass, measured without allocating it, on fake tensors.

The real module and the real loss run under torch's `FakeTensorMode`, where operators compute only shapes. Every storage
that an operator returns counts until Python releases it, which is when a real one would be freed.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ds_llm.compat.torch import FakeTensorMode, TorchDispatchMode, replace_tensors, tree_leaves
from ds_llm.kernels.linear_cross_entropy import chunk_rows

MEASURED_LAYERS = (6, 9)  # layers are alike, so what a deeper model takes is a straight line through these


class Count(TorchDispatchMode):
    """Counts bytes of storages that are created while it is active; `peak` is the largest number alive at once."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.alive = self.peak = 0
        self._seen = weakref.WeakKeyDictionary({t.untyped_storage(): 0 for t in known})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        if "linear_cross_entropy" in str(func):  # an operator of its own, whose inner tensors are not seen
            self.peak = max(self.peak, self.alive + loss_bytes(*args[:2]))
        return out

    def _add(self, storage) -> None:
        if storage not in self._seen:
            size = storage.nbytes()
            self._seen[storage] = size
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.alive -= size


def loss_bytes(hidden: Tensor, weight: Tensor) -> int:
    """Bytes inside the chunked cross-entropy: the logits of one chunk, and for 16-bit weights their gradient in fp32.

    hidden [T, H], weight [V, H].
    """
    rows = min(chunk_rows(hidden, weight), hidden.shape[0])
    sums = 0 if hidden.dtype == torch.float32 else 4 * weight.numel()
    return rows * weight.shape[0] * hidden.element_size() + sums


def pass_bytes(
    make: Callable[[object], nn.Module], config, objective: Callable, batch: dict[str, tuple], dtype: torch.dtype,
    *, checkpointing: bool, keep_gradients: bool
) -> int:  # fmt: skip
    """Peak bytes of a micro-batch's forward and backward pass, without the weights.

    make: builds the module of a transformers configuration. config: that configuration. objective: wraps a model in its
    loss module. batch: shape and dtype of each argument of the loss. keep_gradients: gradients stay until the end of
    the pass. Otherwise each is freed as soon as it is complete, as under ZeRO 2 and 3.
    """
    layers = config.get_text_config().num_hidden_layers

    def measure(count: int) -> int:
        smaller = copy.deepcopy(config)
        text = smaller.get_text_config()
        text.num_hidden_layers = count
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:count]
        return _measure(make, smaller, objective, batch, dtype, checkpointing, keep_gradients)

    if layers <= max(MEASURED_LAYERS):
        return measure(layers)
    (few, more), (low, high) = MEASURED_LAYERS, map(measure, MEASURED_LAYERS)
    return low + (layers - few) * (high - low) // (more - few)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _fill(model: nn.Module) -> None:
    """Replace parameters and buffers on the meta device by tensors on the CPU; tied ones stay tied."""
    made: dict[int, Tensor] = {}

    def on_cpu(old: Tensor) -> Tensor:
        if id(old) not in made:
            new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)
            made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        return made[id(old)]

    for module in model.modules():
        replace_tensors(module, on_cpu)


def _measure(make, config, objective, batch, dtype, checkpointing: bool, keep_gradients: bool) -> int:
    with torch.device("meta"), _default_dtype(dtype):
        model = make(config)  # not of fake tensors: peft moves adapters to their layers' device, which these refuse
    with FakeTensorMode(), _default_dtype(dtype):
        _fill(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        module = objective(model).train()
        trained = [p for p in module.parameters() if p.requires_grad]
        arguments = {name: torch.zeros(shape, dtype=kind) for name, (shape, kind) in batch.items()}
        if not keep_gradients:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with Count([*module.parameters(), *module.buffers(), *arguments.values()]) as count:
            found = module(**arguments)
            (found.loss_sum + found.aux_loss).backward()
    return count.peak
