"""Sets the variables that torch.distributed reads in processes that srun or mpirun started.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT themselves.
`srun python launch/train.py` (as `deepspeed --launcher slurm` runs it) and `mpirun python launch/train.py` set other
variables, which this module translates. Variables that are set already stay.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from ds_llm.errors import UserError

SLURM_PORTS = range(15000, 30000)  # below the ephemeral ports
DEFAULT_PORT = "29500"


def adopt(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the missing variables in `environment`. Nothing changes under another launcher, or under none."""
    if "RANK" in environment:
        return
    found = _open_mpi(environment) or _mpich(environment) or _slurm(environment)
    if found is None or found["WORLD_SIZE"] == "1":
        return
    if "MASTER_ADDR" not in environment and "MASTER_ADDR" not in found:
        if found["LOCAL_WORLD_SIZE"] != found["WORLD_SIZE"]:
            raise UserError(
                "MASTER_ADDR: not set, and mpirun does not say where rank 0 is; give its host name or address, as in "
                "mpirun -x MASTER_ADDR=node1 ... (in .deepspeed_env with deepspeed --launcher openmpi)"
            )
        found["MASTER_ADDR"] = "127.0.0.1"
    found.setdefault("MASTER_PORT", DEFAULT_PORT)
    for name, value in found.items():
        environment.setdefault(name, value)


def _open_mpi(given: MutableMapping[str, str]) -> dict[str, str] | None:
    return _named(given, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                  "OMPI_COMM_WORLD_LOCAL_SIZE")  # fmt: skip


def _mpich(given: MutableMapping[str, str]) -> dict[str, str] | None:
    return _named(given, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def _named(given: MutableMapping[str, str], *names: str) -> dict[str, str] | None:
    if not all(name in given for name in names):
        return None
    return dict(zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), map(given.get, names), strict=True))


def _slurm(given: MutableMapping[str, str]) -> dict[str, str] | None:
    """The variables of a task of srun; None elsewhere, also in a script of sbatch (no SLURM_STEP_NUM_TASKS)."""
    found = _named(given, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    if found is None:
        return None
    counts = tasks_per_node(given["SLURM_STEP_TASKS_PER_NODE"])
    found["LOCAL_WORLD_SIZE"] = str(counts[int(given.get("SLURM_NODEID", "0"))])
    found["MASTER_ADDR"] = first_node(given.get("SLURM_STEP_NODELIST") or given["SLURM_NODELIST"])
    # one port for all tasks of a step, different ports for jobs and steps on one machine
    number = int(given.get("SLURM_JOB_ID", "0")) * 16 + int(given.get("SLURM_STEP_ID", "0"))
    found["MASTER_PORT"] = str(SLURM_PORTS[number % len(SLURM_PORTS)])
    return found


def tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` as [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def first_node(nodes: str) -> str:
    """The first host of Slurm's compact list: `node03` of `node[03-05,11],gpu1`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in match.groups())
