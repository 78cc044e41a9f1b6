"""The output folder of a run: one run at a time in it, its configuration and versions beside its results."""

from __future__ import annotations

import contextlib
import fcntl
import json
from pathlib import Path

from ds_llm import hardware
from ds_llm.checkpoint import elastic
from ds_llm.checkpoint import folder as checkpoint
from ds_llm.config.options import flatten, to_dict, to_yaml
from ds_llm.config.run import Config
from ds_llm.distributed import shared_folder as places
from ds_llm.errors import UserError
from ds_llm.progress import console
from ds_llm.train.modes import Job

# What may differ between a run and its continuation: everything else would make it another run under the same name.
CHANGEABLE = ("output", "resume", "train.epochs", "train.max_steps", "tracking.", "checkpoint.", "eval.", "data.val")
CHANGEABLE += ("stability.hang_timeout", "stability.lost_timeout")
_kept = contextlib.ExitStack()  # locks of this process besides that of rank 0
# What the figures of an evaluation depend on: with another value they compare with no earlier ones.
MEASURED_BY = ("data.val", "eval.token_length", "eval.stride", "eval.max_windows")


@contextlib.contextmanager
def lock(output: Path):
    """Keep `output` for this run while the block runs; rank 0 takes it before the processes meet.

    Raises `UserError` when another run holds the folder or it cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = open(output / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"output: {output}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"output: {output}: another run is writing there; wait for it or choose another folder"
        ) from None
    with handle:
        yield


def record(config: Config, output: Path, environment: dict, deepspeed: dict) -> None:
    """Save what the run was: the resolved configuration, DeepSpeed's JSON, versions and commit."""
    try:
        (output / "config.yaml").write_text(to_yaml(config))
        (output / "deepspeed.json").write_text(json.dumps(deepspeed, indent=2))
        (output / "environment.json").write_text(json.dumps(environment, indent=2))
    except OSError as error:
        raise UserError(f"output: {output}: cannot be written ({error.strerror})", any_rank=True) from None


def describe(config: Config, job: Job, world: int, device: str, global_batch: int, steps: int) -> dict:
    """Say on the screen what will be trained on what; returns it for the record of the run's start."""
    sizes = [(hardware.whole_shape(p).numel(), p.requires_grad) for p in job.model.parameters()]
    parameters, trained = sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
    share = f" ({trained / 1e6:.2f}M trained)" if trained < parameters else ""
    t = config.train
    batches = global_batch // (t.batch_size * t.accumulation_steps)  # at a time: processes that share one count once
    console.print(
        f"{type(job.model).__name__}, {parameters / 1e6:.1f}M parameters{share}, {t.dtype}, ZeRO-{config.zero}, "
        f"{world} {'process' if world == 1 else 'processes'} on {device}",
        markup=False,
    )
    console.print(
        f"{len(job.samples):,} samples of {job.seq_len} tokens; global batch {global_batch} = "
        f"{t.batch_size} x {t.accumulation_steps} x {batches}; {steps:,} steps",
        markup=False,
    )
    return {
        "parameters": parameters,
        "trained_parameters": trained,
        "world_size": world,
        "zero": config.zero,
        "dtype": t.dtype,
        "samples": len(job.samples),
        "seq_len": job.seq_len,
        "global_batch": global_batch,
        "loss_unit": f"nats per {job.unit}",
        "flops_per_token": hardware.training_flops_per_token(job.model, job.seq_len),
        **job.info,
    }


def resume_point(config: Config, output: Path) -> tuple[Path, dict] | None:
    """The checkpoint to continue from and its state, or None to begin; collective.

    Raises `UserError` where continuing would lose or mix something.
    """
    place = places.of(output)
    if place.keeps and place.ranks[0]:  # a folder beside that of rank 0, which has locked its own
        _kept.enter_context(lock(output))
    held = sorted(set().union(*places.gather(checkpoint.steps(output))), reverse=True)
    if config.resume == "never":
        if held:
            raise UserError(f"output: {output} holds the checkpoints of a run; use resume=auto or another folder")
        return None
    if config.resume == "auto":
        if not held:
            return None
        found = checkpoint.newest_whole(output)
        if found is None:
            raise UserError(
                f"{output / 'checkpoints'}: every checkpoint is damaged; nothing was changed. "
                "Choose another output to begin anew"
            )
    else:
        found = Path(config.resume)
        missing = f"resume: {found}: no such checkpoint folder"
        where = "" if place.alone else f" on {place.hosts[place.ranks[0]]}"
        places.check_all(None if found.is_dir() else missing + where)
        if checkpoint.steps(found):
            newest = checkpoint.folder(found, checkpoint.steps(found)[0])
            raise UserError(f"resume: {found} is a run, not a checkpoint; name one, for example {newest}")
        reason = checkpoint.damage(found)
        if reason is not None:
            raise UserError(f"resume: {found} is damaged ({reason}); resume=auto finds the newest whole one")
        later = [step for step in held if step > checkpoint.read_state(found)["step"]]
        if later:
            raise UserError(
                f"resume: {output} holds later checkpoints (step {later[0]}), which continuing from {found.name} would "
                "replace; choose another output or move them away"
            )
    saved = checkpoint.read_state(found)
    places.check_parts(checkpoint.place_of(found), found, saved["world_size"])
    return found, saved


def check_same_run(config: Config, saved: dict, fingerprint: dict, path: Path) -> list[str]:
    """Refuse to continue a run as another one; returns a line for every key that changed and may.

    saved: a checkpoint's state with `config` and `fingerprint`. What decides the global batch and the sharding is left
    to `elastic.adapt`.
    """
    before, now = _keys(saved["config"]), _keys(to_dict(config))
    notes = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new or name in elastic.SHARDING + elastic.SPLIT:
            continue
        if not any(name == c or (c.endswith(".") and name.startswith(c)) for c in CHANGEABLE):
            raise UserError(f"{name}: the run in {path} has {old!r}, not {new!r}; set it back or choose another output")
        if name not in ("output", "resume"):
            notes.append(f"{name}: {new!r} from here on, {old!r} before")
    for name, old in saved["fingerprint"].items():
        if fingerprint.get(name) != old:
            raise UserError(
                f"data: not what the run in {path} was started on ({name} differs); restore it or "
                "choose another output for a new run"
            )
    return notes


def measures_alike(config: Config, saved: dict) -> bool:
    """Whether evaluations of the run and of its continuation compare."""
    before, now = _keys(saved["config"]), _keys(to_dict(config))
    return all(before.get(name) == now.get(name) for name in MEASURED_BY)


def _keys(values: dict) -> dict:
    """Dotted keys of a configuration; one that an earlier version saved lacks some, which are at their defaults."""
    return flatten(Config, to_dict(Config())) | flatten(Config, values)
