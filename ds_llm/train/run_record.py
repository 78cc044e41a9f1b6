"""Facts about a run at its start: shown on the console, and saved beside its results."""

from __future__ import annotations

import json
from pathlib import Path

from ds_llm import hardware
from ds_llm.config.options import to_yaml
from ds_llm.config.run import Config
from ds_llm.errors import UserError
from ds_llm.progress import console
from ds_llm.train.job import Job


def record(config: Config, output: Path, environment: dict, deepspeed: dict) -> None:
    """Save the resolved configuration, DeepSpeed's JSON, versions and commit of a run."""
    try:
        (output / "config.yaml").write_text(to_yaml(config))
        (output / "deepspeed.json").write_text(json.dumps(deepspeed, indent=2))
        (output / "environment.json").write_text(json.dumps(environment, indent=2))
    except OSError as error:
        raise UserError(f"output: {output}: cannot be written ({error.strerror})", any_rank=True) from None


def describe(config: Config, job: Job, world: int, device: str, global_batch: int, steps: int) -> dict:
    """Print model, data and batch sizes of a run. Returns them for the record of its start."""
    sizes = [(hardware.whole_shape(p).numel(), p.requires_grad) for p in job.model.parameters()]
    parameters, trained = sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
    share = f" ({trained / 1e6:.2f}M trained)" if trained < parameters else ""
    t = config.train
    batches = global_batch // (t.batch_size * t.accumulation_steps)  # at a time: processes that share one count once
    console.print(
        f"{type(job.model).__name__}, {parameters / 1e6:.1f}M parameters{share}, {t.dtype}, ZeRO-{config.zero}, "
        f"{world} {'process' if world == 1 else 'processes'} on {device}"
    )
    console.print(
        f"{job.epoch_samples:,} samples of {job.seq_len} tokens; global batch {global_batch} = "
        f"{t.batch_size} x {t.accumulation_steps} x {batches}; {steps:,} steps"
    )
    return {
        "mode": config.mode,
        "parameters": parameters,
        "trained_parameters": trained,
        "world_size": world,
        "zero": config.zero,
        "dtype": t.dtype,
        "samples": job.epoch_samples,
        "seq_len": job.seq_len,
        "global_batch": global_batch,
        "loss_unit": f"nats per {job.unit}",
        "flops_per_token": hardware.training_flops_per_token(job.model, job.seq_len),
        **job.info,
    }
