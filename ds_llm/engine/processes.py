"""The process group of a job: how to join it, the device of a rank, sums over ranks."""

from __future__ import annotations

import contextlib
import io
import os
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from ds_llm.compat.deepspeed import use_gloo_alone
from ds_llm.distributed.heartbeat import port_in_use
from ds_llm.distributed.watchdog import watched
from ds_llm.engine import builds
from ds_llm.hardware import share_cores


def init_distributed() -> None:
    """Join the process group that the launcher's environment describes; without a launcher, a group of one."""
    # the watchdog ends jobs with lost or hanging ranks, so that collectives may wait for long work of another rank
    limit = timedelta(days=1) if watched() else timedelta(minutes=30)
    if "RANK" not in os.environ:
        # without a real port, which another job could take: a HashStore uses none
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


def all_reduce(values: list[float], op: str = "sum") -> list[float]:
    """Sum or maximum over ranks of a few numbers, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return tensor.tolist()


def device() -> torch.device:
    """Where DeepSpeed computes: the CPU, or this process's accelerator."""
    accelerator = deepspeed.get_accelerator()
    return torch.device(accelerator.current_device_name() if accelerator.device_name() != "cpu" else "cpu")
