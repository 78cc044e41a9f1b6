"""The training loop: batches, loss, step, metrics, evaluation, checkpoint. It knows no mode."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ds_llm import hardware
from ds_llm.checkpoint import folder as checkpoint
from ds_llm.checkpoint.resume import measures_alike
from ds_llm.config.run import Config
from ds_llm.config.text_metrics import LABELS
from ds_llm.data.order import SampleOrder, hash64, micro_batch
from ds_llm.distributed.collectives import gather
from ds_llm.distributed.environment import rank
from ds_llm.distributed.interrupt import EXIT_CODE, Interrupt
from ds_llm.engine import processes
from ds_llm.engine.engine import Engine, StepResult
from ds_llm.errors import UserError
from ds_llm.files import lock
from ds_llm.models.moe import balance
from ds_llm.pretrained import saving
from ds_llm.progress import console
from ds_llm.tracking.throughput import Meter
from ds_llm.tracking.tracker import Tracker
from ds_llm.train import run_record, stability
from ds_llm.train.job import Job
from ds_llm.train.lr_schedule import learning_rate
from ds_llm.train.preflight import meet, preflight, small_data
from ds_llm.train.step import Counted, StepFigures, StepSums, count_batches

RESULTS = ("baseline", "best", "best_step", "texts_at_best", "evals_without_gain")  # of the evaluations so far


class Trainer:
    """Trains a job, new or continued, until its end, an early stop or an interruption.

    `state` is plain JSON and all that a continued run needs: the step, the evaluations so far, the recent losses. The
    position in the data, the learning rate and the random seeds are functions of the step.
    """

    def __init__(self, config: Config, job: Job, fingerprint: dict, interrupt: Interrupt, asked: dict):
        """asked: the configuration as the user gave it; `config` is fitted to the processes (see
        `ds_llm.checkpoint.elastic`)."""
        self.config, self.job, self.interrupt = config, job, interrupt
        self.identity = {"config": asked, "fingerprint": fingerprint}
        self.output = Path(config.output)
        self.engine = Engine(job.objective, config)
        self.layout, self.rank = self.engine.layout, self.engine.rank
        self.order = job.order or SampleOrder(len(job.samples), config.train.seed)
        t = config.train
        self.global_batch = t.batch_size * t.accumulation_steps * self.layout.batches
        self.total = t.max_steps or math.ceil(t.epochs * job.epoch_samples / self.global_batch)
        self.state = {
            "step": 0,
            "tokens": 0,
            "bad_steps": 0,
            "skipped_steps": 0,
            "recent_losses": [],
            "last_eval": -1,
            "baseline": None,
            "best": None,
            "best_step": None,
            "texts_at_best": {},
            "evals_without_gain": 0,
        }
        self.last_saved = -1
        self.stopping = False

    # -- the run --------------------------------------------------------------------------------------------------

    def run(self, resume: tuple[Path, dict] | None, notes: list[str]) -> int:
        """Train, from a checkpoint and its state where there is one; `notes` are shown as warnings.

        Returns the exit code of the process: 0, or `EXIT_CODE` after an interruption.
        """
        if not resume:
            stability.check_weights(self.job.model, self.output, 0, self.config.model.path)
        saves = self.config.checkpoint
        if saves.last or saves.best or saves.every_epoch or saves.every_steps:
            checkpoint.check_space(self.output, self.engine.state_bytes())
        if self.job.prepare is not None and not self.job.prepare(self.engine, self._asked_to_stop):
            reason = self.interrupt.reason or "another process was asked to stop"
            console.print(f"stopped by {reason} before the first step; the same command continues")
            return EXIT_CODE
        if resume:
            self._restore(*resume)
        self._record()
        info = run_record.describe(
            self.config, self.job, self.layout.world, processes.device().type, self.global_batch, self.total
        )
        self.tracker = Tracker(
            self.config, self.output, total_steps=self.total, start_step=self.state["step"], run_info=info
        )
        code = 1
        try:
            if resume:
                self.tracker.event(
                    "resume", f"continuing from {resume[0]}", step=self.state["step"], path=str(resume[0])
                )
            for note in notes:
                self.tracker.event("warning", note, step=self.state["step"])
            self.tracker.attach(self.job.model)
            code = self._loop(info)
        finally:
            self.tracker.close(code)
        return code

    def _asked_to_stop(self) -> bool:
        """Whether any process was asked to stop; collective."""
        return processes.all_reduce([float(self.interrupt.requested())])[0] > 0

    def _loop(self, info: dict) -> int:
        flops = info["flops_per_token"]
        self.meter = Meter(
            total_steps=self.total, flops_per_token=flops, world_size=self.layout.world, dtype=self.config.train.dtype
        )
        self.engine.train()
        self.meter.start()
        while True:
            step, done = self.state["step"], self.state["step"] >= self.total
            if self.stopping and not done:
                self._save()
                reason = self.interrupt.reason or "another process was asked to stop"
                self.tracker.event(
                    "interrupt",
                    f"stopped by {reason} after step {step}, saved; continue with the same command and resume=auto",
                    step=step,
                )
                return EXIT_CODE
            improved = self._evaluate() if self._eval_due() else False
            early = self.config.eval.early_stopping and self.state["evals_without_gain"] >= self.config.eval.patience
            if self._save_due(improved, done or early):
                self._save()
            if done or early:
                break
            self._step()
        return self._finish(early and not done)

    def _step(self) -> None:
        """One optimizer step on the next global batch. All ranks decide alike, from reduced figures."""
        step, layout, size = self.state["step"], self.layout, self.config.train.batch_size
        start, count = step * self.global_batch, self.config.train.accumulation_steps
        picks = [micro_batch(self.order, start, i, layout.batch, layout.batches, size) for i in range(count)]
        batches = [self.engine.part(self.job.samples.batch(pick)) for pick in picks]
        counted = count_batches(self.engine, batches, self.job.count, self.interrupt.requested())
        self.stopping = counted.stop
        sums = self._add_gradients(batches, counted.valid)
        figures = sums.reduce(self.engine, counted.valid, parts=layout.replicas * count)
        reason = stability.veto(
            self.config.stability, self.state, figures.loss, figures.aux_loss, counted.valid, self.job.unit
        )
        if counted.valid and not math.isfinite(figures.loss):
            reason += stability.blame(picks, sums.losses)
        rate = learning_rate(self.config.optim, step, self.total) * self.job.lr_factor
        result = self.engine.step(rate, veto=reason is not None)
        if reason is None and not result.applied:
            reason = "gradient overflow" if self.config.train.dtype == "fp16" else "non-finite gradient"
        if reason is None and figures.expert_load is not None:
            balance(self.job.model, figures.expert_load)
        self._count_step(counted, figures, result, reason)
        self.tracker.step(self._step_record(counted, figures, result, reason))
        if reason:
            self.tracker.event("skip", f"step {step + 1} skipped: {reason}", step=step + 1, loss=figures.loss)
        if self.state["bad_steps"] >= self.config.stability.max_bad_steps:
            raise stability.given_up(self.state, self.output, reason)

    def _add_gradients(self, batches: list[dict[str, torch.Tensor]], valid: float) -> StepSums:
        """Forward and backward passes of this rank's micro-batches; `valid`: what `count` gives of the global batch."""
        seed = self._dropout_seed()
        torch.manual_seed(seed)
        if self.job.begin_step is not None:
            self.job.begin_step(self.engine, batches, valid)
            torch.manual_seed(seed)
        sums = StepSums(self.job.metrics)
        for i, batch in enumerate(batches):
            self.engine.begin_micro_step(last=i == len(batches) - 1)
            found = self.engine.forward(**batch)
            parts = self.layout.replicas * len(batches)
            self.engine.backward(found.loss_sum / max(valid, 1) + found.aux_loss / parts)
            sums.add(found)
        return sums

    def _dropout_seed(self) -> int:
        """A function of seed, step and rank, so that there is no generator state to save."""
        place = self.state["step"] * self.layout.replicas + self.layout.replica
        return int(hash64(np.array([place]), self.config.train.seed, 0)[0] >> np.uint64(1))

    def _count_step(self, counted: Counted, figures: StepFigures, result: StepResult, reason: str | None) -> None:
        """Take a step, skipped for `reason` or applied, into the state."""
        self.state["step"] += 1
        self.state["tokens"] += int(counted.tokens)
        # an fp16 overflow is how the loss scale is found; it is a fault only when there is no lower scale to try
        searching = reason == "gradient overflow" and result.loss_scale > 1
        stability.count(self.config.stability, self.state, reason, figures.loss, fault=not searching)

    def _step_record(self, counted: Counted, figures: StepFigures, result: StepResult, reason: str | None) -> dict:
        """What is recorded of the step that the state has counted last."""
        step = self.state["step"]
        record = {
            "step": step,
            "epoch": step * self.global_batch / self.job.epoch_samples,
            "loss": figures.loss,
            **figures.metrics,
            "grad_norm": result.grad_norm,
            "lr": self.engine.lr(),
            "tokens": self.state["tokens"],
            "samples": step * self.global_batch,
            **self.meter.step(step, counted.processed),
        }
        if figures.expert_load is not None:
            record |= {"aux_loss": figures.aux_report, "expert_load": figures.expert_load}
        if self.config.train.dtype == "fp16":
            record["loss_scale"] = result.loss_scale
        if reason:
            record["skipped"] = reason
        return record

    # -- evaluation -----------------------------------------------------------------------------------------------

    def _eval_due(self) -> bool:
        step, every = self.state["step"], self.config.eval.every_steps
        if self.job.evaluate is None or self.state["last_eval"] == step:
            return False
        if step == 0:
            return self.config.eval.before
        return step >= self.total or bool(every and step % every == 0) or self._epoch_ended()

    def _epoch_ended(self) -> bool:
        """Whether the latest step finished an epoch of the data."""
        consumed, size = self.state["step"] * self.global_batch, self.job.epoch_samples
        return consumed // size > (consumed - self.global_batch) // size

    def _evaluate(self) -> bool:
        """Evaluate on all ranks; returns whether the job's goal is the best of the trained model so far."""
        state, step, goal = self.state, self.state["step"], self.job.goal
        with self.tracker.pause(), self.engine.averaged_weights():
            self.engine.train(False)
            try:
                figures = self.job.evaluate(self.engine)
                samples = self.job.sample(self.engine) if self.job.sample is not None else []
            finally:
                self.engine.train()
        found = figures[goal]
        if state["baseline"] is None:
            state["baseline"] = found
        improved = step > 0 and math.isfinite(found) and (state["best"] is None or found < state["best"])
        if improved:
            state["best"], state["best_step"], state["evals_without_gain"] = found, step, 0
            state["texts_at_best"] = {name: figures[name] for name in LABELS if name in figures}
        elif step > 0:
            state["evals_without_gain"] += 1
        state["last_eval"] = step
        self.tracker.evaluation(
            {
                "step": step,
                "epoch": step * self.global_batch / self.job.epoch_samples,
                **figures,
                "goal": goal,
                f"baseline_{goal}": state["baseline"],
                "trend_percent": 100 * (found / state["baseline"] - 1),
                f"best_{goal}": state["best"] if state["best"] is not None else found,
                **({"samples": samples} if samples else {}),
            }
        )
        self._report()
        self.meter.start()
        return improved

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save_due(self, improved: bool, ending: bool) -> bool:
        c, step = self.config.checkpoint, self.state["step"]
        if step == 0 or self.last_saved == step:
            return False
        if self.state["bad_steps"] and not ending:  # perhaps the weights are lost: good checkpoints must not make room
            return False
        return (
            (ending and c.last)
            or (improved and c.best)
            or bool(c.every_steps and step % c.every_steps == 0)
            or (c.every_epoch and self._epoch_ended())
        )

    def _save(self) -> None:
        step = self.state["step"]
        if self.last_saved == step:
            return
        stability.check_weights(self.job.model, self.output, step, None)
        self.tracker.sync()
        held = {"global_batch": self.global_batch, "deepspeed": self.engine.settings}
        state = self.state | self.identity | held
        with self.tracker.pause():
            path = checkpoint.save(self.output, step, state, self._write, self.engine.state_bytes())
            self.last_saved = step
            if checkpoint.shared_folder_of(path).is_first and not self.state["bad_steps"]:
                best = self.state["best_step"] if self.config.checkpoint.best else None
                checkpoint.prune(self.output, self.config.checkpoint.keep, best)
        self.tracker.event("checkpoint", f"saved {path}", step=step, path=str(path))
        self.meter.start()

    def _write(self, folder: Path) -> None:
        self.engine.save(folder)
        model = self.job.model
        writers = gather(checkpoint.shared_folder_of(self.output).ranks)[0]  # others keep no exported model
        with self.engine.averaged_weights():
            collect = partial(self.engine.gather, model)
            saving.save_sharded(model, collect, self.job.tokenizer, folder / "model", writers)

    def _restore(self, path: Path, saved: dict) -> None:
        self.engine.load(path)
        fresh = self.state
        self.state = {name: saved.get(name, value) for name, value in fresh.items()}
        if not measures_alike(self.config, saved):
            self.state |= {name: fresh[name] for name in RESULTS}
        if path.resolve().parent == (self.output / "checkpoints").resolve():
            self.last_saved = self.state["step"]
            if checkpoint.shared_folder_of(path).is_first:
                checkpoint.set_aside(self.output, self.state["step"])

    # -- what is said and kept ------------------------------------------------------------------------------------

    def _record(self) -> None:
        if self.rank == 0:
            run_record.record(self.config, self.output, hardware.environment(), self.engine.settings)

    def _report(self) -> None:
        if self.rank == 0 and self.config.tracking.report:
            from ds_llm.report import run as report  # matplotlib takes a second to import

            try:
                report.write(self.output)
            except UserError as error:  # no reason to end the training
                self.tracker.event("warning", str(error), step=self.state["step"])

    def _finish(self, early: bool) -> int:
        state = self.state
        if early:
            self.tracker.event(
                "stop",
                f"stopped early: no better {self.job.goal} in {state['evals_without_gain']} evaluations",
                step=state["step"],
            )
        summary = {"steps": state["step"], "tokens": state["tokens"], "skipped_steps": state["skipped_steps"]}
        if state["best"] is not None:
            summary |= {
                f"baseline_{self.job.goal}": state["baseline"],
                f"best_{self.job.goal}": state["best"],
                "best_step": state["best_step"],
                **{f"{name}_at_best_step": value for name, value in state["texts_at_best"].items()},
            }
        if self.rank == 0 and (kept := checkpoint.steps(self.output)):
            chosen = state["best_step"] if state["best_step"] in kept and self.config.checkpoint.best else kept[0]
            summary["model"] = str(checkpoint.publish(self.output, checkpoint.folder(self.output, chosen)))
            summary["model_step"] = chosen
            self.tracker.log_model(self.output / "model")
        if self.rank == 0 and self.config.tracking.report:
            summary["report"] = str(self.output / "report.html")
        self.tracker.summary(summary)
        self._report()
        return 0


def train(config: Config) -> int:
    """Run the configured mode from start to end; every launched process calls it. Returns the exit code."""
    interrupt = Interrupt()
    checked = preflight(config)
    output, fingerprint = Path(config.output), checked.data.fingerprint
    with lock(output) if rank() == 0 else contextlib.nullcontext():
        start = meet(config, output, fingerprint)
        job = checked.build(config)
        trainer = Trainer(config, job, fingerprint, interrupt, start.asked)
        return trainer.run(start.resume, start.notes + small_data(trainer.global_batch, job.epoch_samples))
