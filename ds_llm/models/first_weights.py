"""The first weights of a model, drawn where they are needed and equal to those of a model that is built at once.

A model draws its weights from torch's generator while it is built. `build_deferred` builds it with the same draws, but
keeps none of them: each weight remembers the state of the generator before its module drew it, and draws again on
request. So a rank of ZeRO-3 never holds a whole model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ds_llm.compat.torch import TorchDispatchMode, swap_parameter, tree_leaves
from ds_llm.compat.transformers import watch_first_weights
from ds_llm.models.deferred import BLANK, Deferred, in_place_of, replace

LEAST_BYTES = 1 << 20  # of a weight that is worth drawing twice
DRAWS = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "log_normal_", "geometric_"}
SETS = {"zero_", "fill_", "copy_"}


class _Call:
    """A call that sets the first weights of one module. state: that of torch's generator before it."""

    def __init__(self, initialize: Callable[[nn.Module], None], module: nn.Module):
        self.initialize, self.module, self.state = initialize, module, torch.get_rng_state()


class _Drawing(TorchDispatchMode):
    """Draws large tensors into memory that is dropped.

    least: bytes of a large tensor. calls: by storage of a large tensor, the calls that make up its values. used:
    whether a function read one of them.
    """

    def __init__(self, least: int):
        super().__init__()
        self.least, self.used = least, False
        self.current: _Call | None = None  # None: a constructor, whose draws cannot be repeated alone
        self.calls: dict[int, list[_Call | None]] = {}

    def watch(self, initialize: Callable, module: nn.Module, run: Callable[[], None]) -> None:
        """Run a call that sets the first weights of a module."""
        before, self.current = self.current, _Call(initialize, module)
        try:
            run()
        finally:
            self.current = before

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, function._schema
        name = schema.name.removeprefix("aten::")
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        if not writes or not isinstance(args[0], Tensor):
            views = any(r.alias_info is not None for r in schema.returns)
            if not views and name not in BLANK:
                tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
                self.used |= any(_storage(tensor).data_ptr() in self.calls for tensor in tensors)
            return function(*args, **kwargs)
        target, storage = args[0], _storage(args[0])
        key, size = storage.data_ptr(), storage.nbytes()
        draws, all_of_it = name in DRAWS and size >= self.least, target.numel() * target.element_size() == size
        if not draws and (key not in self.calls or (name in SETS and all_of_it)):
            self.calls.pop(key, None)
            return function(*args, **kwargs)
        if name in DRAWS:
            function(torch.empty_strided(target.shape, target.stride(), dtype=target.dtype), *args[1:], **kwargs)
        if name in DRAWS and all_of_it:
            self.calls[key] = [self.current]
        elif self.current not in self.calls.setdefault(key, []):
            self.calls[key].append(self.current)
        return target


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def build_deferred(build: Callable[[], nn.Module], least: int = LEAST_BYTES) -> nn.Module:
    """The model that `build` returns, with deferred weights where it draws large ones at random.

    build: must give the same model again when it is called again, which happens where a constructor draws a large
    weight that is not drawn again, or computes with it. least: bytes of a large weight. torch's generator is left as
    `build` leaves it.
    """
    state, drawing = torch.get_rng_state(), _Drawing(least)
    with watch_first_weights(drawing.watch), drawing:
        model = build()
    places = defaultdict(list)
    for owner in model.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            places[id(parameter)].append((owner, name))
    known = [(p, places[id(p)], drawing.calls.get(_storage(p).data_ptr(), ())) for p in model.parameters()]
    if drawing.used or any(None in calls for _, _, calls in known):
        torch.set_rng_state(state)
        return build()
    outlines = {id(p): (torch.empty_like(p, device="meta"), found) for p, found, _ in known}
    sources = {id(p): _First(calls, id(p), outlines) for p, _, calls in known if calls}

    def deferred(old: Tensor) -> Tensor:
        return in_place_of(old, Deferred(outlines[id(old)][0], sources[id(old)])) if id(old) in sources else old

    replace(model, deferred)
    return model


class _First:
    """Computes the first values of a parameter by repeating the calls that drew them."""

    def __init__(self, calls: list[_Call], own: int, outlines: dict[int, tuple[Tensor, list]]):
        self.calls, self.own, self.outlines = calls, own, outlines

    @torch.no_grad()
    def __call__(self) -> Tensor:
        # a call draws for all weights of its module in a row, so each needs memory of its size
        modules = {id(module) for call in self.calls for module in call.module.modules()}
        needed = {
            key: (outline, places)
            for key, (outline, places) in self.outlines.items()
            if any(id(owner) in modules for owner, _ in places)
        }
        real = {key: nn.Parameter(torch.empty_like(outline, device="cpu")) for key, (outline, _) in needed.items()}
        places = [(owner, name, real[key]) for key, (_, places) in needed.items() for owner, name in places]
        before = [(owner, name, swap_parameter(owner, name, parameter)) for owner, name, parameter in places]
        try:
            with torch.random.fork_rng(devices=[]):
                for call in self.calls:
                    torch.set_rng_state(call.state)
                    call.initialize(call.module)
        finally:
            for owner, name, parameter in before:
                swap_parameter(owner, name, parameter)
        return real[self.own].detach()
