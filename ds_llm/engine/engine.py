"""A model under DeepSpeed: training step, weights, states on disk."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from ds_llm.compat import deepspeed_optimizers as masters
from ds_llm.compat.deepspeed import (
    BF16_Optimizer,
    DeepSpeedZeroOptimizer,
    DeepSpeedZeroOptimizer_Stage3,
    FP16_Optimizer,
    FP16_UnfusedOptimizer,
    is_partitioned,
    is_shared_expert,
    leave_states_to_us,
    loss_scale,
    unpartitioned_numel,
)
from ds_llm.config.deepspeed import build as build_deepspeed_config
from ds_llm.config.run import Config
from ds_llm.engine import nvme, optimizers
from ds_llm.engine import resharding as reshard
from ds_llm.engine.ema import MovingAverage
from ds_llm.engine.moe_blocks import keep_blocks_whole
from ds_llm.engine.processes import all_reduce, device
from ds_llm.engine.weights import place
from ds_llm.errors import UserError, first_line
from ds_llm.models.documents import Documents
from ds_llm.models.parameters import decay_groups, exact_buffers, leave_out, restore_buffers
from ds_llm.parallel.parallelize import Division
from ds_llm.parallel.tensor import note_whole_shapes

# DeepSpeed's optimizer classes -> the class that finds the fp32 weights of each
MASTERS = {
    DeepSpeedZeroOptimizer_Stage3: masters.Zero3,
    DeepSpeedZeroOptimizer: masters.Zero12,
    BF16_Optimizer: masters.Zero1Bf16,
    FP16_Optimizer: masters.Fused16,
    FP16_UnfusedOptimizer: masters.Unfused16,
    torch.optim.Optimizer: masters.Plain,
}


@dataclass
class StepResult:
    """Result of an optimizer step: whether the weights changed, the global gradient norm, the fp16 loss scale."""

    applied: bool
    grad_norm: float
    loss_scale: float


class Engine:
    """A module under DeepSpeed: forward, backward, step with a veto, averaged weights, states on disk.

    module: any nn.Module. config: the run's configuration. DeepSpeed builds the optimizer from its JSON, so offloaded
    and fused versions are available. Weights with fewer than two dimensions get no weight decay.
    """

    def __init__(self, module: nn.Module, config: Config):
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        self.config = config
        self.settings = build_deepspeed_config(config, self.world_size)
        self.stage = self.settings["zero_optimization"]["stage"]
        self._division = Division(module, config, self.settings)
        self.layout = self._division.layout
        if self.stage == 3 and self.layout.expert == 1:
            keep_blocks_whole(module)
        exact = exact_buffers(module)
        if nvme.asked(self.settings):
            nvme.take_folders(self.settings, config.output, self.rank)
        self._frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
        if self._frozen:
            leave_out(module, self._frozen)
            self._frozen = self._frozen | {name for name, _ in module.named_buffers()}
        place(module, self.settings)
        groups = decay_groups(module, config.optim.weight_decay)
        try:
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module,
                model_parameters=groups,
                config=self.settings,
                optimizer=optimizers.maker(module, self.settings),
            )
        except (ValueError, AssertionError, ImportError) as error:
            raise UserError(f"DeepSpeed cannot use this configuration: {first_line(error)}") from error
        restore_buffers(module, exact, device())
        note_whole_shapes(module)
        kind = next(kind for kind in MASTERS if isinstance(self._optimizer, kind))
        self._masters = MASTERS[kind](self._optimizer)
        self.module = module
        self.has_own_schedule = "scheduler" in self.settings
        rates = [config.optim.lr if self.has_own_schedule else g["lr"] for g in self._optimizer.param_groups]
        self._lr_ratios = [rate / config.optim.lr for rate in rates]  # `optim.schedule` moves all groups in proportion
        self.average: MovingAverage | None = None
        if config.ema.enabled:
            self.average = MovingAverage(self._masters.weights(), config.ema.decay)
        self._states = reshard.States(self._masters, module, self.average, self._division.of_weights)
        leave_states_to_us(self._engine, reshard.read_file)

    # -- training -----------------------------------------------------------------------------------------------------

    def forward(self, **batch):
        """Run the module on `batch`, moved to the device.

        With sequence parallelism `batch` is this rank's shard from `part`, and the ranks of a row run together.
        """
        if "position_ids" in batch and not {"row_positions", "attention_mask"} & batch.keys():
            # found on the CPU, so that nothing waits for the device
            packed = Documents.of(batch["position_ids"], device())
            batch |= {} if packed is None else {"packed": packed}
        batch = {k: v.to(device()) if torch.is_tensor(v) else v for k, v in batch.items()}
        return self._engine(**self._division.arguments(batch))

    def part(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's shard of a micro-batch: all of it, or with sequence parallelism a part of every row."""
        return self._division.part(batch)

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)
        self._division.train(mode)

    def total(self, values: list[float]) -> list[float]:
        """Sum over ranks, in float64. Ranks of a tensor group compute the same and count once."""
        return all_reduce([value * self.layout.counts for value in values])

    def begin_micro_step(self, last: bool) -> None:
        """Call it before each forward pass. last: it is the last micro-batch of the optimizer step."""
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`. Losses of ranks and micro-batches are summed, not averaged."""
        # DeepSpeed averages over ranks and divides by the accumulation steps, but the caller's losses are summands
        micro_steps = self._engine.gradient_accumulation_steps()
        loss = loss * self.layout.replicas * micro_steps
        if isinstance(self._masters, masters.Fused16):
            # without ZeRO, DeepSpeed 0.19 divides fp16 gradients by the loss scale but never multiplies the loss by it;
            # setting the gradient, not the loss, is right for versions that do multiply it too
            loss.register_hook(lambda g: torch.full_like(g, self._optimizer.loss_scale / micro_steps))
        self._engine.backward(loss)

    def step(self, lr: float, veto: bool = False) -> StepResult:
        """Update the weights. With a gradient that is not finite, or a veto, only drop the gradients."""
        if not self.has_own_schedule:
            for group, ratio in zip(self._optimizer.param_groups, self._lr_ratios, strict=True):
                group["lr"] = lr * ratio
        plain_norm = self._division.clipped_norm() if isinstance(self._masters, masters.Plain) else None
        if plain_norm is not None and not torch.isfinite(plain_norm):
            veto = True
        scale = self._optimizer.loss_scale if isinstance(self._masters, masters.Unfused16) else 1.0
        with self._masters.overflow(device()) if veto else contextlib.nullcontext():
            self._engine.step()
        applied = not veto and not getattr(self._optimizer, "overflow", False)
        norm = plain_norm if plain_norm is not None else self._engine.get_global_grad_norm()
        norm = norm / scale if norm is not None else None  # this one optimizer reports the norm of scaled gradients
        if applied and self.average is not None:
            self.average.update(self._masters.weights())
        return StepResult(applied, float(norm) if norm is not None else float("nan"), loss_scale(self._optimizer))

    def lr(self) -> float:
        """Learning rate of the latest step, `optim.lr` under its schedule."""
        return float(self._optimizer.param_groups[0]["lr"]) / self._lr_ratios[0]

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """While the block runs, the module holds the averaged weights; without an average, its own."""
        if self.average is None:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        self.average.swap(self._masters.weights())
        self._masters.push()

    # -- weights and states -------------------------------------------------------------------------------------------

    def gather(
        self, model: nn.Module, keeper: Callable[[str], int | None] = lambda name: 0, trained_only: bool = False
    ) -> dict[str, torch.Tensor]:
        """Whole weights and buffers of `model` on the CPU, those that this rank keeps. Collective.

        Under ZeRO-3 one parameter at a time is gathered. keeper: of a name the rank that keeps it, None where no rank
        does; it must say the same on all ranks. trained_only: without frozen weights and buffers.
        """
        state = dict(self._division.whole_weights(model, _gathered, keeper, trained_only))
        if not trained_only:
            persistent = model.state_dict().keys()
            buffers = {n: b for n, b in model.named_buffers() if n in persistent and keeper(n) == self.rank}
            state |= {name: buffer.detach().cpu() for name, buffer in buffers.items()}
        return state

    def save(self, folder: Path) -> None:
        """Write the optimizer, master weights and average of all ranks into `folder`. Collective.

        Frozen weights are not written: a continued run loads them with the model.
        """
        self._engine.save_checkpoint(
            str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=bool(self._frozen)
        )
        self._states.save(folder)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, bit for bit, also at another world size or ZeRO stage."""
        if not self._states.lie_as_in(folder):
            self._states.load(folder)
            reshard.load_common(self._engine, self.module, folder)
            return
        path, _ = self._engine.load_checkpoint(str(folder), tag="deepspeed", custom_load_fn=self._load_trained)
        if path is None:
            raise UserError(f"{folder}: holds no DeepSpeed state; delete the folder to go on from an older checkpoint")
        self._states.load_average(folder)

    def _load_trained(self, src: dict, dst: nn.Module) -> None:
        found = dst.load_state_dict(src, strict=False)
        # ZeRO-3 saves the experts that ranks share only in its own files
        elsewhere = {n for n, p in dst.named_parameters() if self.stage == 3 and is_shared_expert(p)}
        missing = [name for name in found.missing_keys if name not in self._frozen | elsewhere]
        if missing or found.unexpected_keys:
            name = (missing or found.unexpected_keys)[0]
            raise UserError(f"the checkpoint is not of this model: {name} is {'missing' if missing else 'unknown'}")

    def state_bytes(self) -> int:
        """Approximate bytes of this rank's part of a checkpoint: master weights, two moments, average, weights."""
        held = self._states.held
        per_weight = 4 * 3 + (4 if self.average is not None else 0)
        if self.stage == 0 and self.rank != 0:
            return 0
        weights = sum(unpartitioned_numel(p) for p in self.module.parameters() if p.requires_grad)
        # rank 0 writes the weights twice: in DeepSpeed's file and as the exported model
        return held * per_weight + (2 * weights * 4 if self.rank == 0 else 0)

    def destroy(self) -> None:
        """Release the engine's hooks and buffers."""
        self._engine.destroy()
        gc.collect()


def _gathered(parameter: nn.Parameter):
    """A context manager that gathers a parameter of ZeRO-3."""
    return deepspeed.zero.GatheredParameters([parameter] if is_partitioned(parameter) else [])
