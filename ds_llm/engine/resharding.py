"""Loads optimizer states that were saved under another world size or ZeRO stage.

Beside DeepSpeed's files each rank with states writes which part of which parameter is where in them:

    checkpoints/step-00000100/parts_rank00000.json    {"optimizer", "inner", "ranks", "swapped", "fragments"}

A run with another layout reads only the numbers that its own rank updates, from the files of all ranks: fp32 weights,
every state of the optimizer (Adam: both moments and the step), moving averages. The files are mapped into memory, so a
rank needs memory only for what it keeps. Nothing is converted or written, and all ranks read at the same time.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ds_llm.compat import deepspeed_optimizers as masters
from ds_llm.compat.deepspeed import SCALER, TRUSTED, loss_scaler, unpartitioned_numel
from ds_llm.distributed.collectives import gather
from ds_llm.engine.ema import MovingAverage
from ds_llm.errors import UserError, first_line
from ds_llm.progress import progress


def read_file(path: str | Path, map_location="cpu", mmap: bool = False) -> dict:
    """The content of a checkpoint's file: tensors, plain values, `TRUSTED` classes. Raises `UserError` for others."""
    classes = [getattr(sys.modules[module], name) for module, _, name in (t.rpartition(".") for t in TRUSTED)]
    try:
        with torch.serialization.safe_globals(classes):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; delete the checkpoint to go on from an older one", any_rank=True) from None
    except Exception as error:  # unpickling raises what it likes
        raise UserError(f"{path}: cannot be read ({first_line(error)})", any_rank=True) from error


def _swapped(rank: int, tensor: int) -> str:
    return f"swapped_rank{rank:05d}_{tensor:05d}.pt"


class _Segment(NamedTuple):
    """Elements offset to offset + length - 1 of a parameter, saved from `start` of tensor `tensor` of rank `part`."""

    offset: int
    length: int
    part: int
    tensor: int
    start: int


class Checkpoint:
    """The parts that all ranks saved, by parameter name. Raises `UserError` where all or some of them are missing."""

    def __init__(self, folder: Path):
        self.folder, self._files, self._averages = folder, {}, {}
        files = sorted(folder.glob("parts_rank*.json"))
        try:
            self._parts = [json.loads(path.read_text()) for path in files]
            if not files:
                raise UserError(
                    f"{folder}: was saved by an earlier version, which continues only on as many processes and at the "
                    "ZeRO stage that saved it"
                )
            self.kind, self.ranks = masters.KINDS[self._parts[0]["optimizer"]], self._parts[0]["ranks"]
            if len(files) != self.ranks:
                raise UserError(
                    f"{folder}: has the parts of {len(files)} processes of {self.ranks}; to continue on others every "
                    "machine must see all of them, in a shared folder"
                )
            self._segments = defaultdict(list)
            for number, part in enumerate(self._parts):
                for name, tensor, start, length, offset in part["fragments"]:
                    self._segments[name].append(_Segment(offset, length, number, tensor, start))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: parts_rank*.json cannot be read ({type(error).__name__}: {error})") from None
        for name, segments in self._segments.items():
            segments.sort()
            ends = [0, *(p.offset + p.length for p in segments)]
            if any(p.offset != end for p, end in zip(segments, ends, strict=False)):
                raise UserError(f"{folder}: the parts of {name} overlap or have gaps between them")

    def part(self, number: int) -> masters.Saved:
        """The part that rank `number` saved."""
        if number not in self._files:
            found = sorted((self.folder / "deepspeed").glob(self.kind.file(number)))
            path = found[0] if found else self.folder / "deepspeed" / self.kind.file(number)
            names = [name for name, *_ in self._parts[number]["fragments"]]
            saved = self.kind.read(read_file(path, mmap=True), names)
            for tensor in self._parts[number]["swapped"]:
                own = read_file(self.folder / _swapped(number, tensor), mmap=True)
                saved.weights[tensor], saved.states[tensor] = own["weight"], own["state"]
            self._files[number] = saved
        return self._files[number]

    def average(self, number: int) -> dict:
        """The moving average of rank `number`."""
        if number not in self._averages:
            self._averages[number] = read_file(self.folder / f"ema_rank{number:05d}.pt", mmap=True)
        return self._averages[number]

    def segments(self, fragment: masters.Fragment, name: str) -> list[tuple[_Segment, slice, slice]]:
        """Where the elements of `fragment` are: segment, slice of the saved tensor, slice of this rank's tensor."""
        segments, found = self._segments.get(name), []
        whole = unpartitioned_numel(fragment.param)
        if not segments or segments[-1].offset + segments[-1].length != whole:
            fault = "another size" if segments else "missing"
            raise UserError(f"{self.folder}: is not of this model: {name} is {fault}", any_rank=True)
        at, end = fragment.offset, fragment.offset + fragment.length
        first = bisect_right(segments, at, key=lambda p: p.offset) - 1
        for segment in segments[first:]:
            if at >= end:
                break
            stop = min(end, segment.offset + segment.length)
            there, here = segment.start + at - segment.offset, fragment.start + at - fragment.offset
            found.append((segment, slice(there, there + stop - at), slice(here, here + stop - at)))
            at = stop
        return found


class States:
    """The states of this rank: float32 weights, optimizer states, averages.

    owner: the object of `ds_llm.compat.deepspeed_optimizers` that updates the weights of `module`. average: of the same
    weights, or None. apart: ranks hold different weights without ZeRO too (`ds_llm.parallel`). held: number of weights
    that this rank updates.
    """

    def __init__(self, owner, module: nn.Module, average: MovingAverage | None, apart: bool = False):
        self.owner, self.average = owner, average
        self._each = owner.sharded or apart
        names = {param: name for name, param in module.named_parameters()}
        self._fragments = [(names[f.param], f) for f in owner.fragments()]
        self._rank = dist.get_rank() if self._each else 0
        self._writes = self._each or dist.get_rank() == 0
        self.held = sum(f.length for _, f in self._fragments)

    def description(self) -> dict:
        """The layout, as parts_rank*.json holds it."""
        return {
            "optimizer": type(self.owner).__name__,
            "inner": f"{type(self.owner.inner).__module__}.{type(self.owner.inner).__name__}",
            "ranks": dist.get_world_size() if self._each else 1,
            "swapped": self.owner.swapped(),
            "fragments": [[name, f.tensor, f.start, f.length, f.offset] for name, f in self._fragments],
        }

    def save(self, folder: Path) -> None:
        """Write what DeepSpeed does not write: the layout, averages, states that are kept on NVMe."""
        for i in self.owner.swapped():
            weight = self.owner.weights()[i]
            with self.owner.present(i):
                held = {"weight": weight.detach(), "state": dict(self.owner.inner.state[weight])}
                torch.save(held, folder / _swapped(self._rank, i))
        if self._writes:
            (folder / f"parts_rank{self._rank:05d}.json").write_text(json.dumps(self.description()))
            if self.average is not None:
                torch.save(self.average.state(), folder / f"ema_rank{self._rank:05d}.pt")

    def lie_as_in(self, folder: Path) -> bool:
        """Whether DeepSpeed can load the checkpoint: every rank has the layout with which it was written. Collective.

        A checkpoint without a recorded layout, of an earlier version, counts as equal. States on NVMe count as
        different.
        """
        path, mine = folder / f"parts_rank{self._rank:05d}.json", self.description()
        alike = json.loads(path.read_text()) == mine and not mine["swapped"] if path.exists() else None
        answers = gather(alike)
        return all(answers) or all(answer is None for answer in answers)

    def load_average(self, folder: Path) -> None:
        """Load the average of a checkpoint with this rank's layout."""
        if self.average is not None:
            self.average.restore(read_file(folder / f"ema_rank{self._rank:05d}.pt"))

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Load the states of a checkpoint with any layout, and update the module's weights. Collective."""
        saved = Checkpoint(folder)
        fragments = defaultdict(list)
        for name, fragment in self._fragments:
            fragments[fragment.tensor].append((name, fragment))
        inner = self.owner.inner
        title = f"reading the states of {saved.ranks} {'process' if saved.ranks == 1 else 'processes'}"
        with progress(title, self.held, "weights") as task:
            for i, weight in enumerate(self.owner.weights()):
                segments = [p for name, f in fragments[i] for p in saved.segments(f, name)]
                with self.owner.present(i, changed=True):
                    state = self._gather(saved, i, weight, segments, task)
                    if state:
                        inner.state[weight] = {k: _as_kept_by(inner, weight, k, v) for k, v in state.items()}
                    else:
                        inner.state.pop(weight, None)
        if len(inner.param_groups) != len(saved.part(0).groups):
            raise UserError(
                f"{folder}: has {len(saved.part(0).groups)} groups of weights, not {len(inner.param_groups)}"
            )
        for group, before in zip(inner.param_groups, saved.part(0).groups, strict=True):
            group |= {key: before[key] for key in ("lr", "initial_lr", "step") if key in before}
        if self.average is not None:
            self.average.updates = saved.average(0)["updates"]
        _restore_scaler(self.owner.optimizer, saved.part(0).scaler)
        self.owner.push()

    def _gather(self, saved: Checkpoint, number: int, weight: torch.Tensor, segments: list, task) -> dict:
        """Fill `weight`, this rank's tensor `number`, and its average. Returns its optimizer state."""
        flat = weight.detach().view(-1)
        average = self.average.tensors[number].view(-1) if self.average is not None else None
        # of a tensor that is nothing but padding, the state too has the step
        state = {key: _empty(weight, value) for key, value in saved.part(0).states.get(0, {}).items()}
        for segment, there, here in segments:
            part = saved.part(segment.part)
            flat[here] = part.weights[segment.tensor].view(-1)[there].to(flat.device)
            for key, value in part.states.get(segment.tensor, {}).items():
                if not torch.is_tensor(value) or value.dim() == 0:
                    state[key] = value
                    continue
                if value.numel() < there.stop:
                    raise UserError(
                        f"{saved.folder}: the optimizer's '{key}' is not one number for each weight; start "
                        f"{saved.ranks} processes at the ZeRO stage that saved it",
                        any_rank=True,
                    )
                state[key].view(-1)[here] = value.view(-1)[there].to(flat.device)
            if average is not None:
                held = saved.average(segment.part)["average"][segment.tensor].view(-1)[there]
                average[here] = held.to(average.device)
            task.advance(here.stop - here.start)
        return state


def load_common(engine, module: nn.Module, folder: Path) -> None:
    """Load from rank 0's file what all ranks share: DeepSpeed's counters and scheduler, the module's buffers."""
    found = sorted((folder / "deepspeed").glob("*mp_rank_00_model_states.pt"))
    state = read_file(found[0] if found else folder / "deepspeed" / "mp_rank_00_model_states.pt", mmap=True)
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, state[name])
    if engine.lr_scheduler is not None and state.get("lr_scheduler") is not None:
        engine.lr_scheduler.load_state_dict(state["lr_scheduler"])
    for name, buffer in module.named_buffers():
        if name in state["module"]:
            buffer.copy_(state["module"][name])


def _empty(weight: torch.Tensor, value):
    """Zeros like `weight` for a state with its shape; another state is one value for all weights."""
    if torch.is_tensor(value) and value.dim():
        return torch.zeros_like(weight, dtype=value.dtype, requires_grad=False)
    return value


def _as_kept_by(inner: torch.optim.Optimizer, weight: torch.Tensor, key: str, value):
    """A state in the type that `inner` uses: torch counts steps in a tensor, DeepSpeed's optimizers in a number."""
    if torch.is_tensor(value) and value.dim():
        return value
    if key == "step" and not type(inner).__module__.startswith("torch."):
        return int(value)
    if key == "step":
        group = inner.param_groups[0]
        on_device = group.get("fused") or group.get("capturable")
        return torch.tensor(float(value), device=weight.device if on_device else "cpu")
    return value.clone() if torch.is_tensor(value) else value


def _restore_scaler(optimizer, saved) -> None:
    live = loss_scaler(optimizer)
    for name in SCALER:
        value = saved.get(name) if isinstance(saved, dict) else getattr(saved, name, None)
        if value is not None and hasattr(live, name):
            setattr(live, name, value)
