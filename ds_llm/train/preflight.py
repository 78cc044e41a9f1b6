"""All checks before a run begins: first those of each process by itself, then those of all together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ds_llm.checkpoint import resume
from ds_llm.checkpoint.resume import Start
from ds_llm.config.deepspeed import adopt, dtype_key
from ds_llm.config.run import Config
from ds_llm.distributed.environment import world_size
from ds_llm.engine import optimizers, processes, startup
from ds_llm.evaluation import generations
from ds_llm.parallel import compatibility, parallelize
from ds_llm.progress import console
from ds_llm.train.job import Job
from ds_llm.train.modes import module


@dataclass(frozen=True)
class Checked:
    """A checked configuration.

    mode: the mode's module. data: what its `check` returned. add_generations: adds generated answers to a job's
    evaluations.
    """

    mode: ModuleType
    data: Any
    add_generations: Callable[[Job], None]

    def build(self, config: Config) -> Job:
        """Build the model and combine it with the data."""
        job = self.mode.build(config, self.data)
        self.add_generations(job)
        return job


def preflight(config: Config) -> Checked:
    """Find every mistake that a process can find by itself, before it waits for others or builds a model.

    Copies values of the DeepSpeed JSON into `config`. Raises `ConfigError` or `UserError`.
    """
    for note in adopt(config, world_size()):
        console.print(note)
    compatibility.check(config, world_size())
    startup.check_dtype(config.train.dtype, dtype_key(config))
    optimizers.check(config)
    mode = module(config.mode)
    data = mode.check(config)
    parallelize.check(config)
    return Checked(mode, data, generations.prepare(config, data.tokenizer))


def meet(config: Config, output: Path, fingerprint: dict) -> Start:
    """Join the other processes and find the checkpoint from which the run in `output` continues. Collective.

    Fits `config` to the number of processes, see `ds_llm.checkpoint.elastic`. Raises `ConfigError` or `UserError`.
    """
    processes.init_distributed()
    startup.check_settings(config)
    return resume.start(config, output, fingerprint)


def small_data(global_batch: int, samples: int) -> list[str]:
    """A warning where a step takes more samples than there are."""
    if global_batch <= samples:
        return []
    return [
        f"a step takes {global_batch:,} samples and the data set has {samples:,}: each step goes through it more than "
        "once; lower train.batch_size or train.accumulation_steps"
    ]
