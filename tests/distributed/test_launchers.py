"""Ranks of processes that srun and mpirun start."""

import os
import random
import socket
import subprocess
import sys

import pytest
from jobs import PATIENCE, ROOT, environment

from ds_llm.distributed import launchers
from ds_llm.errors import UserError
from ds_llm.tracking import metrics_file as metrics

SLURM = {  # as srun 22.05 sets them for the tasks of `srun -N 2 -n 3`
    "SLURM_JOB_ID": "812",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "node[03,07]",
}


def test_tasks_of_srun_know_their_place():
    found = []
    for rank, (node, local) in enumerate([(0, 0), (0, 1), (1, 0)]):
        given = SLURM | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
        launchers.adopt(given)
        found.append([given[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")])
    expected = [["0", "3", "0", "2"], ["1", "3", "1", "2"], ["2", "3", "0", "1"]]
    assert found == [[*place, "node03"] for place in expected]
    assert int(given["MASTER_PORT"]) in launchers.SLURM_PORTS


def test_the_script_of_a_batch_job_and_a_single_task_are_alone():
    script = {name: value for name, value in SLURM.items() if "_STEP_" not in name} | {"SLURM_PROCID": "0"}
    single = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    of_torchrun = SLURM | {"RANK": "5", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    for given in (script, single, of_torchrun, {}):
        before = dict(given)
        launchers.adopt(given)
        assert given == before


def test_slurms_lists_are_read():
    hosts = [f"{random.choice('abc')}{random.randrange(100)}" for _ in range(2)]
    for text, first in (
        (",".join(hosts), hosts[0]),
        ("n[007-009,12],m3", "n007"),
        ("rack1-n[8,10]", "rack1-n8"),
        ("n[1-2].cluster,z", "n1.cluster"),
        ("single", "single"),
    ):
        assert launchers.first_node(text) == first
    counts = [random.randint(1, 8) for _ in range(5)]
    assert launchers.tasks_per_node(",".join(map(str, counts))) == counts
    assert launchers.tasks_per_node("4(x3),2") == [4, 4, 4, 2]


def test_ranks_of_mpirun_and_where_rank_0_is():
    mpi = {f"OMPI_COMM_WORLD_{name}": value for name, value in
           {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()}  # fmt: skip
    with pytest.raises(UserError, match=r"mpirun -x MASTER_ADDR=node1"):
        launchers.adopt(dict(mpi))
    given = mpi | {"MASTER_ADDR": "node1"}
    launchers.adopt(given)
    assert (given["RANK"], given["LOCAL_RANK"], given["MASTER_ADDR"]) == ("3", "1", "node1")
    here = mpi | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    launchers.adopt(here)
    assert (here["MASTER_ADDR"], here["MASTER_PORT"]) == ("127.0.0.1", "29500")
    hydra = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
    launchers.adopt(hydra)
    assert (hydra["RANK"], hydra["WORLD_SIZE"]) == ("0", "2")


def test_two_tasks_of_srun_train_together(tiny, tmp_path):
    """Real processes, with what srun sets in their environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_PORT": str(port)}
    common |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0"}
    command = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        *tiny,
        "train.max_steps=2",
        f"output={tmp_path / 'run'}",
    ]
    tasks = [
        subprocess.Popen(
            command,
            env=environment(**common, SLURM_PROCID=str(task), SLURM_LOCALID=str(task)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    try:
        (out, err), (other, _) = (task.communicate(timeout=PATIENCE) for task in tasks)
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], err
    assert "2 processes on cpu" in out and other == ""
    assert [r["step"] for r in metrics.read(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "step"] == [1, 2]
    assert os.environ.get("SLURM_PROCID") is None
