"""Fits a run that continues on another number of processes: its split of the global batch and its sharding may change.

The samples of a step are a function of the step and of the global batch (`ds_llm.data.order`), so a run with the same
global batch sees the same samples. `ds_llm.engine.resharding` loads the states into the new layout.
"""

from __future__ import annotations

import json
from pathlib import Path

from ds_llm.config import deepspeed as deepspeed_config
from ds_llm.config.deepspeed import read
from ds_llm.config.run import Config
from ds_llm.engine.resharding import Checkpoint
from ds_llm.errors import ConfigError, UserError

SHARDING = ("zero", "deepspeed")  # keys that decide how states are sharded
SPLIT = ("train.batch_size", "train.accumulation_steps")  # keys whose product with the processes is the global batch
# Sections of the DeepSpeed JSON that do not change the computation, or that repeat keys of the run
FREE = {
    "zero_optimization",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "tensor_parallel",
    "bf16",
    "fp16",
    "data_types",
    "communication_data_type",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "activation_checkpointing",
    "aio",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
    "comms_logger",
    "timers",
}
IMPLEMENTATION = {"torch_adam", "fused", "foreach"}  # of the optimizer's parameters


def split(total: int, processes: int, batch_size: int) -> tuple[int, int]:
    """(samples of a micro-batch, accumulation steps) for `total` samples on `processes`.

    The micro-batch is the largest possible up to `batch_size`. Raises `UserError` where the processes do not divide the
    total.
    """
    share, rest = divmod(total, processes)
    if rest:
        near = next(n for n in range(processes, 0, -1) if total % n == 0)
        raise UserError(f"{total} samples a step are not to be split over {processes} processes; start {near}")
    size = max(n for n in range(1, min(batch_size, share) + 1) if share % n == 0)
    return size, share // size


def adapt(config: Config, saved: dict, processes: int, path: Path) -> list[str]:
    """Fit `config.train` to the processes, so that each step keeps its samples. Returns a line per change.

    saved: the state of the checkpoint at `path`. Raises `UserError` for another global batch, another optimizer or
    processes that do not divide the batch, and for any change where `checkpoint.elastic` is false.
    """
    before, now = saved["config"], config.train
    asked = {"train.batch_size": now.batch_size, "train.accumulation_steps": now.accumulation_steps}
    old = {name: before["train"][name.partition(".")[2]] for name in SPLIT}
    same_world = saved["world_size"] == processes
    product = old["train.batch_size"] * old["train.accumulation_steps"] * saved["world_size"]
    total, notes = saved.get("global_batch", product), []
    if not same_world and not config.checkpoint.elastic:
        raise UserError(
            f"{path}: was saved by {saved['world_size']} processes and this run has {processes}; start "
            f"{saved['world_size']}, or set checkpoint.elastic=true"
        )
    resharded = _check_sharding(config, saved, processes, path)
    divided = [f"parallel.{name}" for name in ("expert", "tensor") if getattr(config.parallel, name) > 1]
    if config.optim.name in ("muon", "adamw8bit"):  # states that are not one number for each weight of a rank's part
        divided.append(f"optim.name={config.optim.name}")
    if divided and (not same_world or resharded):
        raise UserError(
            f"{path}: with {divided[0]} a run continues only as it was saved: start {saved['world_size']} "
            f"processes with zero={before['zero']}"
        )
    batches = processes // (config.parallel.sequence * config.parallel.tensor)
    if not same_world or resharded:
        Checkpoint(path)  # says what is missing before anything is built
    changed = [name for name in SPLIT if asked[name] != old[name]]
    taken = now.batch_size * now.accumulation_steps * batches
    if taken != total and changed:
        key = changed[0]
        raise UserError(
            f"{key}: the run in {path} takes {total} samples a step, not {taken} ({now.batch_size} x "
            f"{now.accumulation_steps} x {processes} processes); set {key}={old[key]}, which is fitted to the "
            "processes, or choose another output"
        )
    if taken != total:
        try:
            now.batch_size, now.accumulation_steps = split(total, batches, now.batch_size)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        _check_fixed(config, total, processes)
    if not same_world:
        notes.append(
            f"{processes} {'process' if processes == 1 else 'processes'} from here on, {saved['world_size']} before; "
            f"a step takes {now.batch_size} x {now.accumulation_steps} x {batches} = {total} samples as before"
        )
    elif changed:
        notes.append(f"a step takes {now.batch_size} x {now.accumulation_steps} x {batches} = {total} samples")
    if config.zero != before["zero"]:
        notes.append(f"zero: {config.zero} from here on, {before['zero']} before")
    return notes


def _check_sharding(config: Config, saved: dict, processes: int, path: Path) -> bool:
    """Whether the sharding changes. Raises `UserError` where it must not, or where the computation would change too."""
    before = saved["config"]
    changed = [name for name in SHARDING if getattr(config, name) != before.get(name)]
    if changed and not config.checkpoint.elastic:
        name = changed[0]
        raise UserError(
            f"{name}: the run in {path} has {before.get(name)!r}, not {getattr(config, name)!r}; set it back, or set "
            "checkpoint.elastic=true"
        )
    if "deepspeed" not in saved:  # earlier versions did not save it
        if "deepspeed" in changed:
            raise UserError(f"deepspeed: the run in {path} has {before.get('deepspeed')!r}; set it back")
        return bool(changed)
    settings = json.loads(json.dumps(deepspeed_config.build(config, processes)))  # as it would be read back
    old, new = _computed(saved["deepspeed"]), _computed(settings)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise UserError(
                f"deepspeed: {name}: the run in {path} has {old.get(name)!r}, not {new.get(name)!r}; set it back or "
                "choose another output"
            )
    return bool(changed)


def _computed(settings: dict) -> dict:
    """The keys of a DeepSpeed JSON that change the computation."""
    kept = {name: value for name, value in settings.items() if name not in FREE}
    optimizer = dict(kept.get("optimizer", {}))
    optimizer["params"] = {k: v for k, v in optimizer.get("params", {}).items() if k not in IMPLEMENTATION}
    return kept | {"optimizer": optimizer}


def _check_fixed(config: Config, total: int, processes: int) -> None:
    """Raise `ConfigError` where the user's JSON fixes another split."""
    fixed = read(config.deepspeed)
    wanted = {
        "train_micro_batch_size_per_gpu": config.train.batch_size,
        "gradient_accumulation_steps": config.train.accumulation_steps,
    }
    for name, value in wanted.items():
        if fixed.get(name, "auto") not in ("auto", value):
            raise ConfigError(
                f"deepspeed: {name}: {fixed[name]} does not give the run's {total} samples a step on {processes} "
                f'processes; set it to "auto"'
            )
