"""Calibration: draws windows of text, and sums statistics of the layers' inputs on them, a block at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ds_llm.compat.torch import tree_flatten, tree_map_only
from ds_llm.data.files import Position, find, read
from ds_llm.data.rows import Document, documents
from ds_llm.data.tokens import TokenFile
from ds_llm.errors import UserError
from ds_llm.models.backbone import backbone
from ds_llm.progress import progress
from ds_llm.sparsity.targets import Target, expert_hidden, expert_input, expert_rows

SEPARATOR = "\n\n"  # between texts, as when perplexity is measured


@dataclass(frozen=True)
class Windows:
    """Calibration sequences: `tokens` [N, L] int64; `candidates`, how many windows they were drawn from; `rejected`,
    (file, line or row, reason) of rows without a usable text."""

    tokens: Tensor
    candidates: int
    rejected: list[tuple[str, int, str]]


def draw_windows(
    paths: Sequence[str | os.PathLike], tokenizer, sequences: int, length: int, seed: int = 0, field: str = "text"
) -> Windows:
    """Draw `sequences` windows of `length` tokens at random from files, reading them once in bounded memory.

    Texts are joined by blank lines and cut into windows that do not overlap; each starts with the beginning-of-text
    token where the tokenizer puts one in front of a text. Token files (.bin) are cut as they are. Every window is as
    likely as any other (reservoir sampling, Vitter 1985, algorithm R). Raises `UserError` when there are too few.
    """
    binary = [str(path).endswith(".bin") for path in paths]
    if any(binary) and not all(binary):
        raise UserError("token files (.bin) and texts cannot be mixed for calibration; give one kind")
    rejected: list[tuple[str, int, str]] = []
    cut = (
        _token_windows(paths, tokenizer, length)
        if any(binary)
        else _text_windows(paths, tokenizer, length, field, rejected)
    )
    random, kept, seen = np.random.default_rng(seed), [], 0
    for window in cut:
        seen += 1
        if len(kept) < sequences:
            kept.append(window)
        elif (place := int(random.integers(seen))) < sequences:
            kept[place] = window
    if seen < sequences:
        why = f" ({len(rejected):,} rows hold no usable text)" if rejected else ""
        raise UserError(
            f"{', '.join(map(str, paths))}: {seen:,} windows of {length:,} tokens, {sequences:,} are asked for{why}; "
            "give more text, fewer sequences or a shorter length"
        )
    return Windows(torch.from_numpy(np.stack(kept).astype(np.int64)), seen, rejected)


def _token_windows(paths: Iterable[str | os.PathLike], tokenizer, length: int) -> Iterator[np.ndarray]:
    for path in paths:
        file = TokenFile(path)
        file.check_tokenizer(tokenizer)
        for start in range(0, len(file.tokens) - length + 1, length):
            yield file.tokens[start : start + length]


def _text_windows(paths, tokenizer, length: int, field: str, rejected: list) -> Iterator[np.ndarray]:
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    prefix = first if first == [tokenizer.bos_token_id] else []
    need, pending = length - len(prefix), []
    files = find(paths)
    with progress("reading calibration text", sum(file.size for file in files), "bytes") as task:
        for batch in read(files, Position()):
            texts = []
            for row in documents(batch, field):
                if isinstance(row, Document):
                    texts.append(row.text + SEPARATOR)
                else:
                    rejected.append((str(files[batch.file].path), row.number, f"{row.reason} ({row.detail})"))
            if texts:
                for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                    pending += ids
            whole = len(pending) // need * need
            for start in range(0, whole, need):
                yield np.asarray(prefix + pending[start : start + need])
            del pending[:whole]
            task.advance(batch.disk)


class Inputs:
    """Sums over the inputs of a block's weights: sums of squares [G, C], or with `full` of x x^T [G, C, C], float32.

    G is 1, or the number of experts: each sees the tokens routed to it. Weights that are given the same tensor share
    their sums: `leader` names for each weight that was met the one it shares with. `tokens` [G] counts rows.
    """

    def __init__(self, targets: Sequence[Target], full: bool):
        self.full, self.leader, self.sums, self.tokens = full, {}, {}, {}
        self._targets, self._last = targets, (None, None)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sum statistics of the inputs in every forward pass of the block while the context is open."""
        handles, experts = [], {}
        for target in self._targets:
            if target.kind == "experts":
                experts.setdefault(target.module, {})[target.parameter] = target
            else:
                handles.append(target.module.register_forward_pre_hook(self._linear(target)))
        for module, stacks in experts.items():
            handles.append(module.register_forward_pre_hook(self._experts(stacks), with_kwargs=True))
        try:
            yield
        finally:
            self._last = (None, None)
            for handle in handles:
                handle.remove()

    def _linear(self, target: Target):
        def hook(module, args):
            x = args[0]
            shared = self._last[1] if x is self._last[0] else target.name
            leader = self.leader.setdefault(target.name, shared)
            if leader != target.name:
                if leader != shared:
                    raise UserError(f"{target.name}: its inputs change from sequence to sequence")
                return
            self._last = (x, target.name)
            self.add(target, x.reshape(-1, x.shape[-1]))

        return hook

    def _experts(self, stacks: dict[str, Target]):
        def hook(module, args, kwargs):
            hidden, index = expert_rows(module, args, kwargs)
            first, second = stacks[expert_input(module)], stacks["down_proj"]
            self.leader |= {target.name: target.name for target in (first, second)}
            count = first.weight.shape[0]
            for expert in range(count):
                rows = hidden[(index == expert).any(1)]
                if len(rows):
                    self.add(first, rows, expert, count)
                    self.add(second, expert_hidden(module, rows, expert), expert, count)

        return hook

    def add(self, target: Target, rows: Tensor, group: int = 0, groups: int = 1) -> None:
        """Sum up further inputs [T, C] of a weight, or of one expert of it."""
        if target.name not in self.sums:
            columns = rows.shape[-1]
            shape = (groups, columns, columns) if self.full else (groups, columns)
            self.sums[target.name] = torch.zeros(shape, device=rows.device)
            self.tokens[target.name] = [0] * groups
        sums = self.sums[target.name][group]
        if self.full:
            sums.addmm_(rows.t(), rows)
        else:
            sums += rows.square().sum(0)
        self.tokens[target.name][group] += len(rows)


@contextmanager
def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module in float32 on `device`; afterwards back on the CPU in the types it had."""
    tensors = [*module.parameters(), *module.buffers()]
    before = [tensor.dtype for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device, torch.float32 if tensor.is_floating_point() else None)
    try:
        yield
    finally:
        for tensor, dtype in zip(tensors, before, strict=True):
            tensor.data = tensor.data.to("cpu", dtype)


def to(values, device: torch.device | str):
    """All tensors in nested lists, tuples and dictionaries on `device`."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), values)


class Blocks:
    """A model's blocks, run one after the other over all calibration sequences with one block on the device at a time.

    `hidden` [N, L, H] float32 on the CPU are the inputs of the block that is next; `advance` replaces them by its
    outputs. What else a block is given (positions, masks) is recorded once: it must be the same for all sequences, and
    a block's input must be the output of the block before. Raises `UserError` for architectures in which that is not
    so. The model is on the CPU, and what lies outside its blocks must be in float32.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor, device: torch.device):
        self.model, self.blocks, self.tokens, self.device = backbone(model), list(blocks), tokens, device
        self._calls, self._rest = self._record(0)
        if len(tokens) > 1:
            for number, (one, other) in enumerate(zip(self._calls, self._record(1)[0], strict=True)):
                if not _equal(one, other):
                    raise UserError(
                        f"{type(model).__name__}: block {number} is given something beside the hidden states that "
                        "depends on the text; such a model cannot be pruned block by block"
                    )
        self.hidden = self._first_inputs()

    def _forward(self, sequence: int):
        return self.model(input_ids=self.tokens[sequence : sequence + 1], use_cache=False)

    def _record(self, sequence: int) -> tuple[list[_Call], list]:
        """For one sequence, each block's arguments and results beside the hidden states."""
        calls, rest, stack, last = [], [], ExitStack(), None

        def before(block, args, kwargs):
            call, hidden = _Call.split(args, kwargs)
            chained = last is None or torch.equal(hidden, last)
            if len(calls) == len(self.blocks) or block is not self.blocks[len(calls)] or not chained:
                raise UserError(
                    f"{type(self.model).__name__}: its blocks do not simply follow one another; such a model cannot be "
                    "pruned block by block"
                )
            calls.append(call)
            stack.enter_context(placed(block, self.device))
            return to((args, kwargs), self.device)

        def after(block, args, kwargs, output):
            nonlocal last
            stack.close()
            output = to(output, "cpu")
            last = _hidden(output)
            rest.append(output[1:] if isinstance(output, tuple) else None)
            return output

        with stack, _hooks(self.blocks, before, after):
            self._forward(sequence)
        return calls, rest

    def _first_inputs(self) -> Tensor:
        found: list[Tensor] = []

        def before(block, args, kwargs):
            found.append(_Call.split(args, kwargs)[1])
            raise _Reached

        hidden = None
        with _hooks(self.blocks[:1], before):
            for i in range(len(self.tokens)):
                with suppress(_Reached):
                    self._forward(i)
                if hidden is None:
                    hidden = found[0].new_empty(len(self.tokens), *found[0].shape[1:])
                hidden[i] = found.pop()[0]
        return hidden

    def outputs(self, number: int) -> Iterator[Tensor]:
        """Outputs [L, H] on the device of block `number`, which is there, for all sequences in order."""
        call = self._calls[number].to(self.device)
        for hidden in self.hidden:
            yield _hidden(call(self.blocks[number], hidden[None].to(self.device)))[0]

    def advance(self, number: int) -> Iterator[None]:
        """Replace `hidden` by the outputs of block `number`, one sequence a step."""
        for i, output in enumerate(self.outputs(number)):
            self.hidden[i] = output.cpu()
            yield

    def head_inputs(self) -> Iterator[Tensor]:
        """Inputs [L, H] of the output head for all sequences, from the outputs of the last block."""
        for i in range(len(self.tokens)):
            try:
                for block, rest in zip(self.blocks, self._rest, strict=True):
                    block.forward = self._shortcut(self.hidden[i : i + 1], rest)
                yield self._forward(i).last_hidden_state[0]
            finally:
                for block in self.blocks:
                    del block.forward

    @staticmethod
    def _shortcut(hidden: Tensor, rest):
        return lambda *args, **kwargs: hidden if rest is None else (hidden, *rest)


class _Reached(Exception):
    """Ends a forward pass at the first block: the rest is not needed."""


@dataclass(frozen=True)
class _Call:
    """The arguments of a block beside the hidden states, which come first or by the name `hidden_states`."""

    args: tuple
    kwargs: dict
    first: bool

    @classmethod
    def split(cls, args: tuple, kwargs: dict) -> tuple[_Call, Tensor]:
        if args:
            return cls(args[1:], kwargs, True), args[0]
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return cls((), others, False), kwargs["hidden_states"]

    def to(self, device: torch.device) -> _Call:
        return _Call(*to((self.args, self.kwargs), device), self.first)

    def __call__(self, block: nn.Module, hidden: Tensor):
        if self.first:
            return block(hidden, *self.args, **self.kwargs)
        return block(hidden_states=hidden, **self.kwargs)


@contextmanager
def _hooks(blocks: Iterable[nn.Module], before, after=None) -> Iterator[None]:
    handles = []
    for block in blocks:
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            handles.append(block.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _equal(one: _Call, other: _Call) -> bool:
    """Whether two calls have equal arguments beside the hidden states."""
    (mine, shape), (theirs, other_shape) = (tree_flatten((call.args, call.kwargs)) for call in (one, other))
    return shape == other_shape and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(mine, theirs, strict=True)
    )
