"""The float32 weights that DeepSpeed's optimizers update, one class for each kind of optimizer.

- `weights()`: the weights that this rank updates. Under ZeRO these are its partition, without ZeRO all of them.
- `push()`: copies them into the module's weights on all ranks.
- `overflow(device)`: a context manager in which a step drops the gradients, by DeepSpeed's own path for non-finite
ones.

States that move to another layout need more (see `ds_llm.engine.resharding`). `inner` is the torch optimizer that
steps. `fragments()` says which part of which parameter lies where in `weights()`. `file(rank)` is the pattern of the
name of a rank's file in a DeepSpeed checkpoint. `read` finds the tensors of `weights()` and their optimizer states in
it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn import Parameter

from ds_llm.compat.torch import _flatten_dense_tensors, _unflatten_dense_tensors


class Fragment(NamedTuple):
    """A part of a parameter in a tensor of `weights()`.

    Numbers offset .. offset + length - 1 of the flattened parameter lie at start .. of tensor number `tensor`.
    """

    param: Parameter
    tensor: int
    start: int
    length: int
    offset: int


class Saved(NamedTuple):
    """Content of a rank's file in a checkpoint: float32 weights, their optimizer states, the optimizer's groups."""

    weights: list[torch.Tensor]
    states: dict[int, dict]
    groups: list[dict]
    scaler: object | None = None


@contextlib.contextmanager
def _replaced(owner, name: str, stand_in: Callable) -> Iterator[None]:
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        delattr(owner, name)


def _partition(
    tensor: int, params: Iterable[Parameter], flat: torch.Tensor, size: int, rank: int
) -> Iterator[Fragment]:
    """Fragments of `params`, which are views of `flat`, that lie in partition `rank` of `size` numbers."""
    for param in params:
        # by address: the order in `flat` depends on DeepSpeed's settings
        at = (param.data_ptr() - flat.data_ptr()) // param.element_size() - rank * size
        low, high = max(at, 0), min(at + param.numel(), size)
        if low < high:
            yield Fragment(param, tensor, low, high - low, low - at)


class _Owner:
    """Defaults of the classes below."""

    sharded = True

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def inner(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def swapped(self) -> list[int]:
        """Numbers of the tensors of `weights()` that are kept on a disk between steps."""
        return []

    def present(self, tensor: int, changed: bool = False):
        """Context manager that brings tensor number `tensor` of `weights()` and its states into memory.

        changed: write them back to the disk at the end.
        """
        return contextlib.nullcontext()


class Plain(_Owner):
    """An optimizer of torch, which DeepSpeed uses for float32 without ZeRO."""

    sharded = False

    @property
    def inner(self) -> torch.optim.Optimizer:
        return self.optimizer

    @staticmethod
    def file(rank: int) -> str:
        return "mp_rank_00_model_states.pt"

    @staticmethod
    def read(state: dict, names: list[str]) -> Saved:
        """Read the weights by the names of their parameters, in the order of `weights()`."""
        inner = state["optimizer"]
        return Saved([state["module"][name] for name in names], inner["state"], inner["param_groups"])

    def fragments(self) -> Iterator[Fragment]:
        for i, param in enumerate(self.weights()):
            yield Fragment(param, i, 0, param.numel(), 0)

    def weights(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def push(self) -> None:
        """Nothing to do: the optimizer updates the module's own weights."""

    def overflow(self, device: torch.device):
        return _replaced(self.optimizer, "step", lambda *_, **__: None)


class Zero12(_Owner):
    """ZeRO stages 1 and 2."""

    @staticmethod
    def file(rank: int) -> str:
        return f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"

    @staticmethod
    def read(state: dict, names: list[str]) -> Saved:
        own = state["optimizer_state_dict"]
        inner = own["base_optimizer_state"]
        weights = own["single_partition_of_fp32_groups"]
        return Saved(weights, inner["state"], inner["param_groups"], own.get("loss_scaler"))

    def fragments(self) -> Iterator[Fragment]:
        opt = self.optimizer
        groups = zip(*self._groups(), self.weights(), opt.real_dp_process_group, strict=True)
        for i, (params, flat, part, group) in enumerate(groups):
            yield from _partition(i, params, flat, part.numel(), dist.get_rank(group))

    def _groups(self) -> tuple[list, list]:
        return self.optimizer.bit16_groups, self.optimizer.bit16_groups_flat

    def weights(self) -> list[torch.Tensor]:
        return list(self.optimizer.single_partition_of_fp32_groups)

    @torch.no_grad()
    def push(self) -> None:
        self.optimizer.update_lp_params()

    @contextlib.contextmanager
    def overflow(self, device: torch.device) -> Iterator[None]:
        infinite = torch.tensor(float("inf"), device=device)
        with (
            _replaced(self.optimizer, "scaled_global_norm", lambda *_: infinite),
            # with offload, Muon comes before the norm and would move its momentum
            _replaced(self.optimizer, "_apply_muon_updates_cpu_offload", lambda: None),
        ):
            yield


class Zero1Bf16(Zero12):
    """ZeRO stage 1 in bf16, where gradients add up in fp32."""

    def _groups(self) -> tuple[list, list]:
        return self.optimizer.bf16_groups, self.optimizer.bf16_groups_flat

    def weights(self) -> list[torch.Tensor]:
        return list(self.optimizer.fp32_groups_flat_partition)

    def overflow(self, device: torch.device):
        infinite = torch.tensor(float("inf"), device=device)
        return _replaced(self.optimizer, "get_grads_for_norm", lambda *_, **__: ([infinite], []))


class Zero3(_Owner):
    """ZeRO stage 3."""

    file = staticmethod(Zero12.file)

    @staticmethod
    def read(state: dict, names: list[str]) -> Saved:
        own = state["optimizer_state_dict"]
        inner = own["optimizer_state_dict"]
        return Saved(own["fp32_flat_groups"], inner["state"], inner["param_groups"], own.get("loss_scaler"))

    def fragments(self) -> Iterator[Fragment]:
        opt = self.optimizer
        for i, params in enumerate(opt.fp16_groups):
            rank, start = dist.get_rank(opt.sub_group_process_groups[i]), 0
            for param in params:
                size = param.partition_numel()
                length = min(size, param.ds_numel - rank * size)  # the last ranks' parts are padded
                if length > 0:
                    yield Fragment(param, i, start, length, rank * size)
                start += size

    def weights(self) -> list[torch.Tensor]:
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def swapped(self) -> list[int]:
        opt = self.optimizer
        return [i for i in range(len(opt.fp16_groups)) if opt._swappable_optimizer_subgroup(i)]

    @contextlib.contextmanager
    def present(self, tensor: int, changed: bool = False) -> Iterator[None]:
        if tensor not in self.swapped():
            yield
            return
        self.optimizer._optimizer_states_and_gradient_swap_in(tensor)
        try:
            yield
        finally:
            if changed:
                self.optimizer._optimizer_states_and_gradient_swap_out(tensor)
            else:
                self.optimizer._release_swap_buffers(tensor)

    @torch.no_grad()
    def push(self) -> None:
        opt = self.optimizer
        opt._partition_all_parameters()
        for i in range(len(opt.fp16_groups)):
            with self.present(i):
                opt._reassign_or_swap_out_partitioned_parameters(i)
        if opt.persistent_parameters:
            opt.persistent_parameters[0].all_gather(opt.persistent_parameters)

    @contextlib.contextmanager
    def overflow(self, device: torch.device) -> Iterator[None]:
        infinite = torch.tensor(float("inf"), device=device)
        with (
            _replaced(self.optimizer, "_get_norm_groups", lambda: [infinite]),
            # Muon comes before the norm and would move its momentum
            _replaced(self.optimizer, "_apply_muon_to_accumulated_grads", lambda: None),
        ):
            yield


class Fused16(_Owner):
    """fp16 or bf16 without ZeRO, by a fused optimizer: each group is one flat tensor.

    DeepSpeed's constructor steps once on zero gradients. That decays the weights and leaves Adam's bias correction one
    step ahead. So this class copies the module's weights again and clears the states.
    """

    sharded = False
    file = staticmethod(Plain.file)

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self._pull()
        optimizer.optimizer.state.clear()

    @staticmethod
    def read(state: dict, names: list[str]) -> Saved:
        own = state["optimizer"]
        inner = own["optimizer_state_dict"]
        return Saved(own["fp32_groups_flat"], inner["state"], inner["param_groups"], own)

    def fragments(self) -> Iterator[Fragment]:
        for i, params in enumerate(self.optimizer.fp16_groups):
            start = 0
            for param in params:
                yield Fragment(param, i, start, param.numel(), 0)
                start += param.numel()

    def weights(self) -> list[torch.Tensor]:
        return list(self.optimizer.fp32_groups_flat)

    @torch.no_grad()
    def push(self) -> None:
        for flat, low in zip(self.optimizer.fp32_groups_flat, self.optimizer.fp16_groups, strict=True):
            for view, param in zip(_unflatten_dense_tensors(flat, low), low, strict=True):
                param.copy_(view)

    @torch.no_grad()
    def _pull(self) -> None:
        for flat, low in zip(self.optimizer.fp32_groups_flat, self.optimizer.fp16_groups, strict=True):
            flat.copy_(_flatten_dense_tensors(low))

    def overflow(self, device: torch.device):
        return _replaced(self.optimizer.overflow_checker, "check", lambda *_, **__: True)


class Unfused16(Fused16):
    """fp16 or bf16 without ZeRO, by any other optimizer: one tensor for each parameter."""

    @staticmethod
    def read(state: dict, names: list[str]) -> Saved:
        own = state["optimizer"]
        inner = own["optimizer_state_dict"]
        weights = [tensor for group in own["fp32_groups"] for tensor in group]
        return Saved(weights, inner["state"], inner["param_groups"], own)

    def fragments(self) -> Iterator[Fragment]:
        params = [p for group in self.optimizer.fp16_groups for p in group]
        for i, param in enumerate(params):
            yield Fragment(param, i, 0, param.numel(), 0)

    def weights(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.fp32_groups for p in group]

    @torch.no_grad()
    def push(self) -> None:
        for master, param in self._pairs():
            param.copy_(master)

    @torch.no_grad()
    def _pull(self) -> None:
        for master, param in self._pairs():
            master.copy_(param)

    def _pairs(self):
        for high, low in zip(self.optimizer.fp32_groups, self.optimizer.fp16_groups, strict=True):
            yield from zip(high, low, strict=True)


KINDS = {kind.__name__: kind for kind in (Plain, Zero12, Zero1Bf16, Zero3, Fused16, Unfused16)}
