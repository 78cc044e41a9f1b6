"""Sweeps of W&B's server: it chooses the values, and W&B's agents start the trials on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from ds_llm.distributed.interrupt import EXIT_CODE, Interrupt
from ds_llm.errors import ConfigError, UserError, first_line
from ds_llm.files import lock
from ds_llm.progress import console
from ds_llm.sweeps.file import SweepFile

POLL_SECONDS = 0.5


def run(file: SweepFile, output: Path, count: int | None, slots: list[str | None]) -> int:
    """Create the sweep, or join the one saved in `output`, and run an agent in each slot. Returns the exit code.

    Raises `UserError` where W&B cannot be reached; it has no offline sweeps.
    """
    if find_spec("wandb") is None:
        raise UserError("--wandb: wandb is not installed; pip install 'ds_llm[wandb]'")
    if os.environ.get("WANDB_MODE", "online") != "online":
        raise UserError(
            f"--wandb: W&B's server chooses the values, and WANDB_MODE is {os.environ['WANDB_MODE']}; without --wandb "
            "the sweep runs on this machine alone"
        )
    interrupt = Interrupt()
    with lock(output):
        project = str(file.raw.get("project", file.config.tracking.wandb.project))
        entity = file.raw.get("entity")
        identity = _identity(file, output, project, entity)
        count = count or file.run_cap
        agents = []
        for number, gpus in enumerate(slots):
            share = None if count is None else count // len(slots) + (number < count % len(slots))
            if share == 0:
                continue
            environment = dict(os.environ)
            environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
            if gpus is not None:
                environment["CUDA_VISIBLE_DEVICES"] = gpus
            words = [sys.executable, "-m", "wandb", "agent", "--project", project]
            words += ["--entity", str(entity)] if entity else []
            words += ["--count", str(share)] if share else []
            agents.append(subprocess.Popen([*words, identity], env=environment, start_new_session=True))
        while any(agent.poll() is None for agent in agents) and not interrupt.requested():
            time.sleep(POLL_SECONDS)
        if interrupt.requested():
            for _ in range(2):  # the first has an agent wait for its trial, the second has it end the trial
                for agent in agents:
                    if agent.poll() is None:
                        agent.terminate()
                time.sleep(1)
        codes = [agent.wait() for agent in agents]
    if interrupt.requested():
        return EXIT_CODE
    if any(codes):
        raise UserError("an agent of the W&B sweep failed; its own message says why")
    return 0


def definition(file: SweepFile, output: Path) -> dict:
    """The sweep's definition for W&B: trials log to W&B, in folders below `output` with the names of their W&B runs."""
    for parameter in file.parameters.values():
        values = [parameter.fields.get("value", 0), *parameter.fields.get("values", [])]
        if any(value is None for value in values):
            raise ConfigError(f"{file.path}: parameters: {parameter.name}: W&B's agent writes None for null")
    own = [f"output={output.resolve()}/trials/${{oc.env:WANDB_RUN_ID}}", "tracking.wandb.enabled=true"]
    return {**file.raw, "program": str(file.raw.get("program", "launch/train.py")),
            "command": [*file.command, *file.fixed, *own]}  # fmt: skip


def _identity(file: SweepFile, output: Path, project: str, entity: str | None) -> str:
    saved = output / "wandb_sweep"
    if saved.is_file():
        identity = saved.read_text(encoding="utf-8").strip()
        console.print(f"joining the W&B sweep {identity}")
        return identity
    import wandb

    try:
        identity = wandb.sweep(definition(file, output), entity=entity, project=project)
    except wandb.errors.Error as error:
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"--wandb: W&B cannot create the sweep ({reason}); without --wandb the sweep runs on this machine alone"
        ) from None
    saved.write_text(identity + "\n", encoding="utf-8")
    return identity
