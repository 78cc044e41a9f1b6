"""Prunes a loaded model block by block, with one block on the device at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ds_llm.errors import UserError
from ds_llm.kernels.packed_mask import PackedMask
from ds_llm.progress import progress
from ds_llm.pruning.calibrate import Blocks, Inputs, placed
from ds_llm.pruning.scores import Pattern, curvature, magnitude_scores, select, sparsegpt, wanda_scores
from ds_llm.sparsity.targets import Target, block_targets, ends, find_blocks

METHODS = ("magnitude", "wanda", "sparsegpt")
CALIBRATED = ("wanda", "sparsegpt")


@dataclass(frozen=True)
class Pruned:
    """The result of pruning one weight.

    mask: of the weight's shape. tokens: number of calibration tokens, per expert; empty without calibration. dead:
    number of inputs that were 0 on all of them. unseen: experts without calibration tokens, pruned by magnitude.
    """

    mask: PackedMask
    tokens: list[int]
    dead: int = 0
    unseen: int = 0

    @property
    def density(self) -> float:
        return self.mask.nnz / self.mask.shape.numel()


@torch.no_grad()
def prune_model(
    model: nn.Module,
    method: str,
    pattern: Pattern,
    tokens: Tensor | None = None,
    *,
    damping: float = 0.01,
    include: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> dict[str, Pruned]:
    """Prune a model on the CPU in place and return what was done, by parameter name. One block at a time is on
    `device`.

    method: magnitude, wanda or sparsegpt. tokens [N, L] int64: the calibration sequences, which wanda and sparsegpt
    need. damping: SparseGPT's, as a share of the mean diagonal of the Hessian. include: may hold "head" and
    "embeddings", which otherwise stay dense. Embeddings are always pruned by magnitude, because a look-up table has no
    inputs.

    The inputs of a block come from the blocks before it after they were pruned. Inside a block, all statistics come
    from one pass of the dense block, as in the papers. Blocks compute in float32. New weights are rounded to the
    model's dtype before the next block sees them. Raises `UserError` for a model that cannot be pruned, and for a
    pattern that its weights do not fit.
    """
    if (method in CALIBRATED) != (tokens is not None):
        raise ValueError(f"method {method}: calibration tokens are for {' and '.join(CALIBRATED)}")
    model.eval()
    device = torch.device(device)
    named = find_blocks(model)
    targets = [block_targets(*block) for block in named]
    tail = {target.kind: target for target in ends(model, include)}
    everything = [one for block in targets for one in block] + list(tail.values())
    for target in everything:
        pattern.check(target.name, target.weight.shape[-1])
        if not torch.isfinite(target.weight).all():
            raise UserError(f"{target.name}: holds weights that are not finite, so the model cannot be pruned")
    work = _Work(method, pattern, damping, {target.name: target.weight.dtype for target in everything})
    head, done = tail.get("linear"), {}
    passes = 0 if tokens is None else len(tokens) * (2 * len(named) - 1 + (2 if head else 0))
    with ExitStack() as stack:
        if "embedding" in tail:  # first, so that the blocks are calibrated on what it gives
            with placed(tail["embedding"].module, device):
                done |= work.prune([tail["embedding"]], None)
        if tokens is not None:
            stack.enter_context(_in_float32(model, [block for _, block in named]))
            blocks = Blocks(model, [block for _, block in named], tokens, device)
        task = stack.enter_context(progress("pruning", passes or len(named), "sequences" if passes else "blocks"))
        for number, (_, block) in enumerate(named):
            note, inputs = f"block {number + 1}/{len(named)}", None
            with placed(block, device):
                if tokens is not None:
                    inputs = Inputs(targets[number], method == "sparsegpt")
                    with inputs.watching():
                        for _ in blocks.outputs(number):
                            task.advance(note=note)
                done |= work.prune(targets[number], inputs)
                if tokens is None:
                    task.advance(note=note)
                elif head or number + 1 < len(named):
                    for _ in blocks.advance(number):
                        task.advance(note=note)
        if head:
            with placed(head.module, device):
                if tokens is not None:
                    inputs = Inputs([head], method == "sparsegpt")
                    for hidden in blocks.head_inputs():
                        inputs.add(head, hidden.to(device))
                        task.advance(note="head")
                done |= work.prune([head], inputs)
    return done


@dataclass(frozen=True)
class _Work:
    """The settings of one pruning. `dtypes`: by parameter name, the dtype that the new weights are rounded to."""

    method: str
    pattern: Pattern
    damping: float
    dtypes: Mapping[str, torch.dtype]

    def prune(self, targets: Sequence[Target], inputs: Inputs | None) -> dict[str, Pruned]:
        """Prune float32 weights in place. Weights with the same inputs share one sum, which is freed after use."""
        groups: dict[str, list[Target]] = {}
        for target in targets:
            leader = inputs.leader.get(target.name, target.name) if inputs else target.name
            groups.setdefault(leader, []).append(target)
        done = {}
        for leader, members in groups.items():
            sums = inputs.sums.pop(leader, None) if inputs else None
            tokens = inputs.tokens.get(leader, [0]) if inputs else []
            masks, dead, unseen = {member.name: [] for member in members}, 0, 0
            for number in range(len(_matrices(members[0].weight))):
                seen = sums is not None and tokens[number] > 0
                summary = self._summary(sums[number], leader) if seen else None
                if seen:
                    dead += int((summary.dead if self.method == "sparsegpt" else summary == 0).sum())
                unseen += inputs is not None and not seen
                for member in members:
                    weight = _matrices(member.weight)[number]
                    pruned, mask = self._matrix(weight, summary)
                    weight.copy_(pruned.masked_fill_(~mask, 0).to(self.dtypes[member.name]))
                    masks[member.name].append(mask.cpu())
            for member in members:
                whole = torch.stack(masks.pop(member.name)).view(member.weight.shape)
                done[member.name] = Pruned(PackedMask.from_dense(whole), tokens, dead, unseen)
        return {target.name: done[target.name] for target in targets}

    def _summary(self, sums: Tensor, name: str):
        """What the method knows of a matrix's inputs: sums of squares for Wanda, a `Curvature` for SparseGPT."""
        if self.method == "sparsegpt":
            return curvature(sums, self.damping, name)
        if not torch.isfinite(sums).all():
            raise UserError(f"{name}: the calibration text gives inputs that are not finite")
        return sums

    def _matrix(self, weight: Tensor, summary) -> tuple[Tensor, Tensor]:
        """The pruned matrix and its mask. Without statistics of its inputs the matrix is pruned by magnitude."""
        if summary is None:
            return weight.clone(), select(magnitude_scores(weight), self.pattern)
        if self.method == "wanda":
            return weight.clone(), select(wanda_scores(weight, summary), self.pattern)
        return sparsegpt(weight, summary, self.pattern)


def _matrices(weight: Tensor) -> Tensor:
    """View a matrix or a stack of experts as [G, R, C]; a matrix has G = 1."""
    return weight.view(-1, *weight.shape[-2:])


@contextmanager
def _in_float32(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Cast the modules outside of the blocks to float32 on the CPU while the block runs."""
    inner = {id(t) for block in blocks for t in (*block.parameters(), *block.buffers())}
    outer = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in inner and t.is_floating_point()]
    before = [tensor.dtype for tensor in outer]
    for tensor in outer:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in zip(outer, before, strict=True):
            tensor.data = tensor.data.to(dtype)
