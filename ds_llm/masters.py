"""The fp32 weights that DeepSpeed's optimizers update, one class for each optimizer, by duck typing.

`weights()` are those this rank updates: its partition under ZeRO, all of them without. `push()` copies them into the
module's weights on all ranks. In a block of `overflow(device)` a step of the optimizer takes DeepSpeed's own path for
non-finite gradients, which drops them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


@contextlib.contextmanager
def _replaced(owner, name: str, stand_in: Callable) -> Iterator[None]:
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        delattr(owner, name)


class Plain:
    """Of an optimizer of torch: fp32 without ZeRO."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def weights(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def push(self) -> None:
        """They are the module's weights."""

    def overflow(self, device: torch.device):
        return _replaced(self.optimizer, "step", lambda *_, **__: None)


class Zero12:
    """ZeRO stages 1 and 2."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def weights(self) -> list[torch.Tensor]:
        return list(self.optimizer.single_partition_of_fp32_groups)

    @torch.no_grad()
    def push(self) -> None:
        self.optimizer.update_lp_params()

    def overflow(self, device: torch.device):
        infinite = torch.tensor(float("inf"), device=device)
        return _replaced(self.optimizer, "scaled_global_norm", lambda *_: infinite)


class Zero1Bf16(Zero12):
    """ZeRO stage 1 in bf16, where gradients add up in fp32."""

    def weights(self) -> list[torch.Tensor]:
        return list(self.optimizer.fp32_groups_flat_partition)

    def overflow(self, device: torch.device):
        infinite = torch.tensor(float("inf"), device=device)
        return _replaced(self.optimizer, "get_grads_for_norm", lambda *_, **__: ([infinite], []))


class Zero3:
    """ZeRO stage 3."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def weights(self) -> list[torch.Tensor]:
        return list(self.optimizer.fp32_partitioned_groups_flat)

    @torch.no_grad()
    def push(self) -> None:
        opt = self.optimizer
        opt._partition_all_parameters()
        for i in range(len(opt.fp16_groups)):
            opt._reassign_or_swap_out_partitioned_parameters(i)
        if opt.persistent_parameters:
            opt.persistent_parameters[0].all_gather(opt.persistent_parameters)

    def overflow(self, device: torch.device):
        infinite = torch.tensor(float("inf"), device=device)
        return _replaced(self.optimizer, "_get_norm_groups", lambda: [infinite])


class Fused16:
    """fp16 or bf16 without ZeRO, by a fused optimizer: each group is one flat tensor.

    DeepSpeed builds this optimizer with a step on zero gradients, which decays the weights and leaves Adam's bias
    correction one step ahead: the module's weights are taken again and the states forgotten.
    """

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self._pull()
        optimizer.optimizer.state.clear()

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
