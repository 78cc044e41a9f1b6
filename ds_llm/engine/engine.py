"""DeepSpeed, which only this module and `ds_llm.parallel` import: configuration, training step, weights, save, load."""

from __future__ import annotations

import contextlib
import difflib
import gc
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

os.environ["PATH"] = (
    f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja of this environment
)

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would find out too, with a warning

import deepspeed
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn

from ds_llm.compat import deepspeed_optimizers as masters
from ds_llm.compat.deepspeed import (
    AsyncIOBuilder,
    BF16_Optimizer,
    DeepSpeedConfigError,
    DeepSpeedZeroOptimizer,
    DeepSpeedZeroOptimizer_Stage3,
    FP16_Optimizer,
    FP16_UnfusedOptimizer,
    is_partitioned,
    is_shared_expert,
    leave_states_to_us,
    loss_scale,
    set_z3_leaf_modules,
    unpartitioned_numel,
    use_gloo_alone,
)
from ds_llm.compat.transformers import MOE_BLOCKS
from ds_llm.config.deepspeed import AskedKeys
from ds_llm.config.deepspeed import build as build_deepspeed_config
from ds_llm.config.run import Config
from ds_llm.distributed.heartbeat import port_in_use
from ds_llm.distributed.watchdog import watched
from ds_llm.engine import builds, nvme
from ds_llm.engine import resharding as reshard
from ds_llm.engine.ema import MovingAverage
from ds_llm.errors import ConfigError, UserError
from ds_llm.hardware import share_cores
from ds_llm.models.parameters import decay_groups, exact_buffers, leave_out, restore_buffers
from ds_llm.parallel.parallelize import Division
from ds_llm.parallel.tensor import note_whole_shapes

# DeepSpeed's optimizers, and what knows where each has its fp32 weights
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
    """What one optimizer step did: whether weights changed, the global gradient norm, the fp16 loss scale."""

    applied: bool
    grad_norm: float
    loss_scale: float


def init_distributed() -> None:
    """Join the process group the launcher described; a process without a launcher forms a group of one."""
    # where lost and hanging ranks are noticed by themselves, nobody may wait in vain for long work of another
    limit = timedelta(days=1) if watched() else timedelta(minutes=30)
    if "RANK" not in os.environ:
        # without a port, which another job could take: the number is not used
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(os.getpid()))
        backend = "nccl" if device().type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share_cores()
    builds.guard()
    use_gloo_alone()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it has built
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=limit)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise port_in_use() from None


def check_dtype(dtype: str, key: str) -> None:
    """Raise `ConfigError` that names `key` for a type (fp32, bf16, fp16) in which DeepSpeed does not train here."""
    if dtype == "fp16" and not deepspeed.get_accelerator().is_fp16_supported():
        kind = "CPU" if device().type == "cpu" else "device"
        raise ConfigError(f"{key}: DeepSpeed finds no fp16 arithmetic on this {kind}; use bf16 or fp32")


def check_settings(config: Config) -> None:
    """Let DeepSpeed read the run's JSON before a model is built.

    Raises `ConfigError` for what DeepSpeed refuses and for top-level keys that it does not know, which it would ignore.
    """
    settings = AskedKeys(build_deepspeed_config(config, dist.get_world_size()))
    try:
        deepspeed.DeepSpeedConfig(settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"deepspeed: {error.title}: {place}: {first['msg']}") from None
    except (DeepSpeedConfigError, ValueError, AssertionError, TypeError, AttributeError) as error:
        raise ConfigError(f"deepspeed: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from None
    for name in settings:
        if name not in settings.asked:
            near = difflib.get_close_matches(name, settings.asked, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"deepspeed: {name}: DeepSpeed has no such key{hint}")
    nvme.check(settings, AsyncIOBuilder().is_compatible)


def all_reduce(values: list[float], op: str = "sum") -> list[float]:
    """Sum or maximum over ranks of a few numbers, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return tensor.tolist()


def device() -> torch.device:
    accelerator = deepspeed.get_accelerator()
    return torch.device(accelerator.current_device_name() if accelerator.device_name() != "cpu" else "cpu")


class Engine:
    """A module under DeepSpeed: forward, backward, step with a veto, averaged weights, states on disk.

    `module` is any nn.Module; `config` the run's configuration. The optimizer is built by DeepSpeed from its JSON, so
    offloaded and fused versions come with it. Weights with fewer than two dimensions get no weight decay.
    """

    def __init__(self, module: nn.Module, config: Config):
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        self.config = config
        self.settings = build_deepspeed_config(config, self.world_size)
        self.stage = self.settings["zero_optimization"]["stage"]
        self._division = Division(module, config, self.settings)
        self.layout = self._division.layout
        if self.stage == 3 and self.layout.expert == 1:
            _keep_experts_whole(module)
        exact = exact_buffers(module)
        if nvme.asked(self.settings):
            nvme.take_folders(self.settings, config.output, self.rank)
        self._frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
        if self._frozen:
            leave_out(module, self._frozen)
            self._frozen = self._frozen | {name for name, _ in module.named_buffers()}
        groups = decay_groups(module, config.optim.weight_decay)
        try:
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module, model_parameters=groups, config=self.settings
            )
        except (ValueError, AssertionError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"DeepSpeed cannot use this configuration: {reason}") from error
        restore_buffers(module, exact, device())
        note_whole_shapes(module)
        kind = next(kind for kind in MASTERS if isinstance(self._optimizer, kind))
        self._masters = MASTERS[kind](self._optimizer)
        self.module = module
        self.has_own_schedule = "scheduler" in self.settings
        self.average: MovingAverage | None = None
        if config.ema.enabled:
            self.average = MovingAverage(self._masters.weights(), config.ema.decay)
        self._states = reshard.States(self._masters, module, self.average, self._division.of_weights)
        leave_states_to_us(self._engine, reshard.read_file)

    # -- training -----------------------------------------------------------------------------------------------------

    def forward(self, **batch):
        """Run the module on tensors moved to the device; on a part of rows as `part` returned it, with other ranks."""
        batch = {k: v.to(device()) if torch.is_tensor(v) else v for k, v in batch.items()}
        return self._engine(**self._division.arguments(batch))

    def part(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What of a micro-batch this rank trains on: all, or its part of every row."""
        return self._division.part(batch)

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)
        self._division.train(mode)

    def total(self, values: list[float]) -> list[float]:
        """Sum over what ranks compute, in float64; ranks that compute the same count once."""
        return all_reduce([value * self.layout.counts for value in values])

    def begin_micro_step(self, last: bool) -> None:
        """Say, before the forward pass, whether the coming backward pass is the last of the optimizer step."""
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`. Over ranks and micro-steps losses are summed, not averaged."""
        # DeepSpeed averages over ranks and divides by the accumulation steps; the caller's losses are parts of a sum.
        micro_steps = self._engine.gradient_accumulation_steps()
        loss = loss * self.layout.replicas * micro_steps
        if isinstance(self._masters, masters.Fused16):
            # without ZeRO, DeepSpeed 0.19 divides fp16 gradients by the loss scale but never multiplies the loss by it;
            # setting the gradient, not the loss, is right for versions that do multiply it too
            loss.register_hook(lambda g: torch.full_like(g, self._optimizer.loss_scale / micro_steps))
        self._engine.backward(loss)

    def step(self, lr: float, veto: bool = False) -> StepResult:
        """Update the weights, unless a gradient is not finite or `veto` is set; then gradients are dropped."""
        if not self.has_own_schedule:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
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
        """Learning rate of the latest step."""
        return float(self._optimizer.param_groups[0]["lr"])

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside the block the module holds the moving average; without one, its own weights."""
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

    def gather(self, model: nn.Module, trained_only: bool = False) -> dict[str, torch.Tensor] | None:
        """Whole weights of `model` on the CPU, on rank 0 (None elsewhere), one parameter at a time under ZeRO-3.

        trained_only: without frozen weights and buffers.
        """
        state = dict(self._division.whole_weights(model, _gathered, trained_only))
        if self.rank == 0 and not trained_only:
            persistent = model.state_dict().keys()
            state.update({n: b.detach().cpu() for n, b in model.named_buffers() if n in persistent})
        return state if self.rank == 0 else None

    def save(self, folder: Path) -> None:
        """Write optimizer, master weights and average of all ranks into `folder`; every rank must call it.

        Frozen weights are not written: they come from where the module was loaded from.
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
        # ZeRO-3 keeps the experts that ranks share in its own files alone
        elsewhere = {n for n, p in dst.named_parameters() if self.stage == 3 and is_shared_expert(p)}
        missing = [name for name in found.missing_keys if name not in self._frozen | elsewhere]
        if missing or found.unexpected_keys:
            name = (missing or found.unexpected_keys)[0]
            raise UserError(f"the checkpoint is not of this model: {name} is {'missing' if missing else 'unknown'}")

    def state_bytes(self) -> int:
        """Bytes this rank's part of a checkpoint takes, roughly: master weights, two Adam moments, average, weights."""
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


@contextlib.contextmanager
def inference(module: nn.Module, config: Config) -> Iterator[Callable]:
    """The forward pass of a frozen module in `train.dtype`, without gradients, while the block runs.

    Under ZeRO-3 the weights are sharded over the ranks, which must then all call it equally often; else every rank
    holds all of them. The module is of no use afterwards.
    """
    module.requires_grad_(False).eval()
    settings = build_deepspeed_config(config, dist.get_world_size())
    if settings["zero_optimization"]["stage"] < 3:
        module.to(device())
        run, release = module, lambda: None
    else:
        _keep_experts_whole(module)
        exact = exact_buffers(module)
        zero = {k: v for k, v in settings["zero_optimization"].items() if k != "offload_optimizer"}
        names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16", "fp16", "steps_per_print")
        chosen = {name: settings[name] for name in names if name in settings}
        run, *_ = deepspeed.initialize(model=module, config=chosen | {"zero_optimization": zero})
        restore_buffers(module, exact, device())
        run.eval()
        release = run.destroy

    @torch.no_grad()
    def forward(**batch):
        return run(**{k: v.to(device()) if torch.is_tensor(v) else v for k, v in batch.items()})

    try:
        yield forward
    finally:
        release()


def _keep_experts_whole(module: nn.Module) -> None:
    """Have ZeRO-3 gather the blocks of `MOE_BLOCKS` as one, or ranks whose tokens skip an expert wait without end for
    ranks whose tokens use it.

    It takes a block's gradients when that of the block's input is there; of an input without one, below which all is
    frozen, before they are. So inputs always get one.
    """
    blocks = [m for m in module.modules() if type(m).__name__ in MOE_BLOCKS]
    for block in blocks:
        if any(p.requires_grad for p in block.parameters()):
            block.register_forward_pre_hook(_require_gradient)
    if blocks:
        set_z3_leaf_modules(module, list({type(m) for m in blocks}), raise_if_not_found=False)


def _require_gradient(_, args: tuple) -> tuple:
    hidden, *rest = args
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    return hidden, *rest


def _gathered(parameter: nn.Parameter):
    """A context in which a parameter of ZeRO-3 is whole."""
    return deepspeed.zero.GatheredParameters([parameter] if is_partitioned(parameter) else [])
