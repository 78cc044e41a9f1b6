"""Sends what happens in a run to `metrics.jsonl`, the console, TensorBoard and Weights & Biases.

All but the metrics file are sinks: objects that take the file's records through `step`, `eval`, `event` and `summary`.
`sync` puts what a sink took on the disk, and `close` ends it. They exist on rank 0 only.
"""

from __future__ import annotations

import math
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ds_llm.config.run import Config
from ds_llm.distributed.environment import rank
from ds_llm.errors import UserError
from ds_llm.tracking.console import Console
from ds_llm.tracking.metrics_file import MetricsFile
from ds_llm.tracking.tensorboard import TensorBoard
from ds_llm.tracking.wandb import Wandb, check_wandb


class Tracker:
    """Sends the records of a training loop to the metrics file and all sinks. On ranks other than 0 it does nothing.

    start_step: the step from which the run continues, 0 for a new run. Records after it are dropped from
    `output/metrics.jsonl` and hidden in TensorBoard, see `ds_llm.tracking.metrics_file.MetricsFile`. Call `step` for
    every optimizer step before saving its checkpoint, and `sync` before saving, for a file without gaps.

    Values may be Python numbers, tensors or arrays. `run_info` is recorded once (parameters, world size, ZeRO stage,
    ...). Raises `UserError` where the metrics cannot be written or W&B cannot be used as configured.
    """

    def __init__(self, config: Config, output: Path, *, total_steps: int, start_step: int = 0, run_info: dict):
        check_wandb(config)
        self._sinks = []
        self._metrics = None
        self._per_token = run_info.get("loss_unit", "nats per token") == "nats per token"
        if rank() != 0:
            return
        self._output = output = Path(output)
        if config.tracking.wandb.enabled:  # first, because it may fail and nothing is written yet
            self._sinks.append(Wandb(config, output, start_step, run_info))
        self._metrics = MetricsFile(output / "metrics.jsonl", start_step)
        if config.tracking.tensorboard:
            with self._writing():
                self._sinks.append(TensorBoard(config, output, start_step))
        self._console = Console(total_steps, start_step, config.tracking.log_every)
        self._sinks.append(self._console)
        self._metrics.write("event", {"event": "start", "step": start_step, "total_steps": total_steps, **run_info})

    def step(self, metrics: dict) -> None:
        """Record an optimizer step.

        metrics: `step` (from 1), `epoch`, `loss` (in `loss_unit` of `run_info`), `grad_norm`, `lr`, `tokens` and
        `samples` (consumed so far, all ranks), the figures of `Meter.step`; where they apply `aux_loss`, `skipped` (the
        reason), `expert_load` [layers][experts] (counts or shares of the routed tokens) and figures of the mode.
        `ppl` = exp(loss) is added where the loss is per token.
        """
        if not self._metrics:
            return
        if self._per_token and metrics.get("loss") is not None and "ppl" not in metrics:
            loss = float(metrics["loss"])
            metrics = {**metrics, "ppl": math.exp(loss) if loss < 700 else math.inf}
        self._send("step", metrics)

    def evaluation(self, metrics: dict) -> None:
        """Record an evaluation.

        metrics: `step`, `epoch`, `goal` (name of the deciding figure, lower is better; default perplexity), that
        figure, `baseline_<goal>`, `trend_percent` (change against the baseline), `best_<goal>`; optionally further
        figures, `tokens`, `windows`, `seconds` and `samples` [{"prompt", "text"}].
        """
        self._send("eval", metrics)

    def event(self, kind: str, message: str, **fields) -> None:
        """Record an event and show its message. kind: checkpoint, resume, skip, interrupt, stop, warning, ...; fields:
        recorded with it, `step` among them."""
        self._send("event", {"event": kind, "message": message, **fields})

    def summary(self, metrics: dict) -> None:
        """Record the final figures of the run, in the order to show them."""
        self._send("summary", metrics)

    def attach(self, model: torch.nn.Module) -> None:
        """Have W&B draw the histograms that `tracking.wandb.watch` asks for.

        Call it before the first step. model: the one whose parameters the optimizer updates in place.
        """
        for sink in self._sinks:
            if isinstance(sink, Wandb):
                sink.watch(model)

    def log_model(self, folder: Path) -> None:
        """Upload an exported model folder as a W&B artifact if `tracking.wandb.log_model` is on."""
        for sink in self._sinks:
            if isinstance(sink, Wandb):
                sink.log_model(Path(folder))

    @contextmanager
    def pause(self):
        """Hide the live line while the block, which shows its own progress, runs."""
        if not self._metrics:
            yield
            return
        self._console.stop()
        try:
            yield
        finally:
            self._console.start()

    def sync(self) -> None:
        """Flush all records to the disk. Call it before saving a checkpoint."""
        if self._metrics:
            self._metrics.sync()
            with self._writing():
                for sink in self._sinks:
                    sink.sync()

    def close(self, exit_code: int = 0) -> None:
        """Close all sinks; may be called more than once. An exit code other than 0 marks the W&B run as failed."""
        if self._metrics:
            self._metrics.close()
        sinks, self._sinks, self._metrics = self._sinks, [], None
        for sink in sinks:
            # an error of writing must not hide the error that ends the run
            with suppress(OSError) if exit_code else self._writing():
                sink.close(exit_code)

    def _send(self, kind: str, metrics: dict) -> None:
        if not self._metrics:
            return
        record = self._metrics.write(kind, metrics)
        with self._writing():
            for sink in self._sinks:
                getattr(sink, kind)(record)

    @contextmanager
    def _writing(self):
        """Turn an `OSError` of a sink, such as a full disk, into a `UserError`."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._output}: cannot write the records of the run ({error.strerror or error}); continue with the "
                "same command when that is mended"
            ) from None
