"""Whether a run may continue, and from which checkpoint."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from ds_llm.checkpoint import elastic
from ds_llm.checkpoint import folder as checkpoint
from ds_llm.config.options import flatten, to_dict
from ds_llm.config.run import Config
from ds_llm.distributed import shared_folder
from ds_llm.distributed.collectives import check_all, gather
from ds_llm.distributed.environment import world_size
from ds_llm.errors import UserError
from ds_llm.files import lock

# Keys that may change when a run continues; with any other change it would be another run.
CHANGEABLE = ("output", "resume", "train.epochs", "train.max_steps", "tracking.", "checkpoint.", "eval.", "data.val")
CHANGEABLE += ("stability.hang_timeout", "stability.lost_timeout")
# Keys that change the figures of an evaluation, so that they do not compare with earlier ones.
MEASURED_BY = ("data.val", "eval.token_length", "eval.stride", "eval.max_windows")
_kept = contextlib.ExitStack()  # locks on folders of other machines than rank 0's


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    resume: the checkpoint and its state, None for a new run. asked: the configuration as the user gave it, before it
    was fitted to the processes. notes: warnings to show.
    """

    resume: tuple[Path, dict] | None
    asked: dict
    notes: list[str]


def start(config: Config, output: Path, fingerprint: dict) -> Start:
    """Find the checkpoint from which the run in `output` continues, and fit `config` to the processes. Collective.

    Raises `ConfigError` or `UserError` where the run may not continue.
    """
    resume, asked, notes = resume_point(config, output), to_dict(config), []
    if resume:
        path, saved = resume
        notes += check_same_run(config, saved, fingerprint, path)
        notes += elastic.adapt(config, saved, world_size(), path)
    return Start(resume, asked, notes)


def resume_point(config: Config, output: Path) -> tuple[Path, dict] | None:
    """The checkpoint to continue from and its state, or None for a new run. Collective.

    Raises `UserError` where continuing would lose or overwrite checkpoints.
    """
    shared = shared_folder.of(output)
    if shared.is_first and shared.ranks[0]:  # not rank 0's folder, which rank 0 has locked
        _kept.enter_context(lock(output))
    held = sorted(set().union(*gather(checkpoint.steps(output))), reverse=True)
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
        where = "" if shared.by_all else f" on {shared.hosts[shared.ranks[0]]}"
        check_all(None if found.is_dir() else missing + where)
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
    shared_folder.check_parts(checkpoint.shared_folder_of(found), found, saved["world_size"])
    return found, saved


def check_same_run(config: Config, saved: dict, fingerprint: dict, path: Path) -> list[str]:
    """Raise `UserError` where a key or the data changed that must not. Returns a line for every other changed key.

    saved: a checkpoint's state with `config` and `fingerprint`. `elastic.adapt` checks the keys of the global batch and
    of the sharding.
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
    """Whether evaluations before and after the checkpoint are comparable."""
    before, now = _keys(saved["config"]), _keys(to_dict(config))
    return all(before.get(name) == now.get(name) for name in MEASURED_BY)


def _keys(values: dict) -> dict:
    """Dotted keys of a configuration. Keys that an earlier version did not have get their defaults."""
    return flatten(Config, to_dict(Config())) | flatten(Config, values)
