"""A sweep on this machine: Optuna chooses the values, each trial is a process, the study is a file.

The whole state is in `OUTPUT/study.log` (Optuna's journal) and in the trials' folders, so the same command continues a
killed sweep: finished trials stay, unfinished ones continue from their checkpoints. A trial's random numbers are a
function of its number, so a continued sweep draws the same values as an undisturbed one.
"""

from __future__ import annotations

import itertools
import json
import time
from importlib.util import find_spec
from pathlib import Path

from ds_llm.compat.optuna import trial_id
from ds_llm.config import run as run_config
from ds_llm.config.options import to_yaml
from ds_llm.distributed.interrupt import EXIT_CODE, Interrupt
from ds_llm.errors import ConfigError, UserError
from ds_llm.files import lock
from ds_llm.progress import console, duration
from ds_llm.sweeps.file import SweepFile
from ds_llm.sweeps.trial import TrialProcess, end_orphan

POLL_SECONDS = 0.5
FAILURES = 3  # trials that fail, none having succeeded, before the sweep gives up
SAME = ("method", "metric", "parameters", "command", "early_terminate")  # what a continued sweep must have kept


class Sweep:
    """Runs the trials of a sweep file in `output`, up to `count` in total, one at a time in each slot.

    slots: CUDA_VISIBLE_DEVICES of each slot; None leaves it as it is.
    """

    def __init__(self, file: SweepFile, output: Path, count: int | None, slots: list[str | None]):
        if find_spec("optuna") is None:
            raise UserError("sweeps need Optuna, which is not installed: pip install 'ds_llm[sweep]'")
        self.file, self.output, self.slots = file, output, slots
        self.grid = None
        if file.method == "grid":
            names = [p.name for p in file.varying]
            combinations = itertools.product(*(p.grid() for p in file.varying))
            self.grid = [dict(zip(names, values, strict=True)) for values in combinations]
        limits = [n for n in (count, file.run_cap, len(self.grid) if self.grid else None) if n is not None]
        if not limits:
            raise ConfigError(f"--count: say how many trials: {file.method} has no end (or set run_cap in {file.path})")
        self.count = min(limits)
        self.running: dict[int, TrialProcess] = {}  # by slot
        self.failed_here, self.done_here = 0, 0

    # -- the study ----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run to the end or to an interruption; returns the exit code."""
        interrupt = Interrupt()
        with lock(self.output):
            self._open()
            left = [t.number for t in self.study.trials if t.state == self.states.RUNNING]
            for number in left:
                self._end_orphan(number)
            while not (stop := interrupt.requested()):
                while len(self.running) < len(self.slots) and (left or self._wanted()):
                    self._start(left.pop(0) if left else None)
                if not self.running:
                    break
                time.sleep(POLL_SECONDS)
                self._look()
            if stop:
                return self._stop(interrupt.reason)
            return self._finish()

    def _open(self) -> None:
        import optuna

        from ds_llm.compat.optuna import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.states = optuna.trial.TrialState
        journal = self.output / "study.log"
        # both can only be of a killed sweep, since this one holds the folder
        Path(f"{journal}.lock").unlink(missing_ok=True)
        _drop_torn_line(journal)
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name="sweep",
            direction="minimize" if self.file.metric.minimize else "maximize",
            sampler=optuna.samplers.RandomSampler(seed=0),
            load_if_exists=True,
        )
        settings = {name: self.file.raw.get(name) for name in SAME} | {"fixed": self.file.fixed}
        settings = json.loads(json.dumps(settings))
        before = self.study.user_attrs.get("settings", settings)
        for name, value in settings.items():
            if before[name] != value:
                what = "the arguments (key=value, --mode)" if name == "fixed" else f"{name} in {self.file.path}"
                raise UserError(
                    f"{self.output}: the sweep there was started with another {what}; set it back or choose another "
                    "--output"
                )
        self.study.set_user_attr("settings", settings)
        done = sum(t.state.is_finished() for t in self.study.trials)
        text = f"{self.file.method} search for {self.count} trials by {self.file.metric.name}, in {self.output}"
        console.print(text + (f"; {done} are finished" if done else ""))

    def _wanted(self) -> bool:
        """Whether to start another trial."""
        best, target = self.best(), self.file.metric.target
        if best is not None and target is not None and not self.file.metric.better(target, best.value):
            return False
        return sum(t.state != self.states.WAITING for t in self.study.trials) < self.count

    def best(self):
        """The finished trial with the best value; None where no trial has finished."""
        done = [t for t in self.study.trials if t.state == self.states.COMPLETE]
        return self.study.best_trial if done else None

    def _sampler(self, number: int):
        import optuna

        if self.file.method == "bayes":
            first = min(10, max(3, self.count // 4))  # drawn at random, before the density of good values is estimated
            return optuna.samplers.TPESampler(seed=number, n_startup_trials=first, constant_liar=len(self.slots) > 1)
        return optuna.samplers.RandomSampler(seed=number)

    # -- trials -------------------------------------------------------------------------------------------------------

    def _ask(self, number: int | None):
        import optuna

        trials = self.study.trials
        if number is not None:
            self.study.sampler = self._sampler(number)
            return optuna.trial.Trial(self.study, trial_id(trials[number]))
        waiting = any(t.state == self.states.WAITING for t in trials)  # of a sweep killed between two lines
        number = len(trials) - waiting
        if self.grid is not None and not waiting:
            self.study.enqueue_trial(self.grid[number])
        self.study.sampler = self._sampler(number)
        return self.study.ask()

    def _values(self, trial) -> dict[str, str]:
        if self.grid is not None:
            drawn = {p.name: trial.suggest_categorical(p.name, p.grid()) for p in self.file.varying}
        else:
            drawn = {p.name: p.suggest(trial) for p in self.file.varying}
        constants = {p.name: p.suggest(trial) for p in self.file.parameters.values() if not p.varies}
        return {name: (drawn | constants)[name] for name in self.file.parameters}

    def _start(self, number: int | None) -> None:
        """Begin a trial, or continue number `number`, in the first free slot."""
        trial = self._ask(number)
        values = self._values(trial)
        trial.set_user_attr("values", values)
        shown = "  ".join(f"{p.name}={values[p.name]}" for p in self.file.varying)
        folder = self.folder(trial.number)
        words = self.file.words(values, f"output={folder}")
        slot = next(i for i in range(len(self.slots)) if i not in self.running)
        gpus = self.slots[slot]
        place = f" on GPU {gpus}" if gpus is not None else ""
        again = "continues" if number is not None else "starts"
        console.print(f"trial {trial.number} {again}{place}: {shown}")
        process = TrialProcess(trial.number, folder, words, self.file.metric, gpus, len(self.slots))
        trial.set_user_attr("process", process.identity)
        trial.set_user_attr("gpus", gpus)
        process.trial, process.began = trial, time.monotonic()
        self.running[slot] = process

    def _end_orphan(self, number: int) -> None:
        identity = self.study.trials[number].user_attrs.get("process")
        if identity:
            console.print(f"trial {number} was left by a sweep that is gone; it is asked to save")
            end_orphan(identity)

    def folder(self, number: int) -> Path:
        return self.output / "trials" / f"{number:04d}"

    def _look(self) -> None:
        for slot, process in list(self.running.items()):
            code = process.process.poll()  # before the file is read: what it wrote last is then there
            self._follow(process)
            if code is not None:
                del self.running[slot]
                self._judge(process, code)

    def _follow(self, process: TrialProcess) -> None:
        """Report new values to the study, and end the trial where the early-stopping rule asks for it."""
        follower, metric = process.follower, self.file.metric
        new = follower.update()
        if not new:
            return
        bands = self.file.early.bands(new[-1]) if self.file.early else []
        known = self.study.trials[process.number].intermediate_values  # a continued trial has some
        for iteration in new:
            if iteration not in known and (iteration == new[-1] or iteration in bands or metric.kind == "eval"):
                process.trial.report(follower.values[iteration], iteration)
        if metric.kind == "eval":
            best = self.best()
            text = f"trial {process.number} step {follower.step}  {metric.name} {follower.values[new[-1]]:.6g}"
            console.print(text + (f"  (best: {best.value:.6g}, trial {best.number})" if best else ""))
        if self.file.early and process.ending is None:
            others = [t.intermediate_values for t in self.study.trials if t.number != process.number]
            reason = self.file.early.verdict(follower.values, others, metric.minimize)
            if reason is not None:
                console.print(f"trial {process.number} is ended early: {reason}")
                process.end(reason)

    def _judge(self, process: TrialProcess, code: int) -> None:
        """Report the end of a trial to the study."""
        follower, name = process.follower, self.file.metric.name
        number, state, value, reason = process.number, self.states.FAIL, follower.best, None
        took = time.monotonic() - process.began
        if code == 0 and value is not None:
            state = self.states.COMPLETE
            text = f"done in {duration(took)}: {name} {value:.6g}"
        elif process.ending is not None and value is not None:
            state, reason = self.states.PRUNED, process.ending
            text = f"ended early after step {follower.step}, in {duration(took)}"
        elif code == 0:
            seen = self.file.metric.field in follower.fields
            have = ", ".join(sorted(f for f in follower.fields if f not in ("kind", "time")))
            reason = f"{name} was never finite" if seen else f"its records have no {name} but {have or 'none'}"
            text = f"failed: {reason}"
        else:
            reason = "interrupted from outside" if code == EXIT_CODE else process.last_error()
            text = f"failed: {reason}"
        spent = self.study.trials[number].user_attrs.get("seconds", 0.0) + took
        process.trial.set_user_attr("seconds", spent)
        process.trial.set_user_attr("steps", follower.step)
        if reason is not None:
            process.trial.set_user_attr("reason", reason)
        complete = state == self.states.COMPLETE
        self.study.tell(number, value if complete else None, state=state)
        console.print(f"trial {number} {text}")
        self.done_here, self.failed_here = self.done_here + complete, self.failed_here + (state == self.states.FAIL)
        self.report()
        if self.failed_here >= FAILURES and not self.done_here and self.best() is None:
            for other in self.running.values():
                other.end("the sweep gives up")
            for other in self.running.values():
                other.process.wait()
            raise UserError(
                f"{self.failed_here} trials failed and none succeeded, the last one: {reason}. Its output: "
                f"{process.folder / 'log.txt'}"
            )

    # -- the end ------------------------------------------------------------------------------------------------------

    def _stop(self, reason: str | None) -> int:
        for process in self.running.values():
            process.end("the sweep was interrupted")
        if self.running:
            console.print(f"stopped by {reason}: waiting for {len(self.running)} trials to save")
        for process in self.running.values():
            process.process.wait()
            spent = self.study.trials[process.number].user_attrs.get("seconds", 0.0)
            process.trial.set_user_attr("seconds", spent + time.monotonic() - process.began)
        self.report()
        console.print("the same command continues")
        return EXIT_CODE

    def _finish(self) -> int:
        best = self.best()
        page = self.report()
        counts = {s.name: sum(t.state == s for t in self.study.trials) for s in self.states}
        console.print(
            f"trials: {counts['COMPLETE']} finished, {counts['PRUNED']} ended early, {counts['FAIL']} failed; report: "
            f"{page}"
        )
        if best is None:
            raise UserError(f"no trial has finished; {self.output}/trials/*/log.txt says why")
        values = best.user_attrs["values"]
        console.print(f"best: trial {best.number}, {self.file.metric.name} {best.value:.6g}")
        for parameter in self.file.varying:
            console.print(f"  {parameter.name}={values[parameter.name]}")
        console.print(
            f"its model: {self.folder(best.number) / 'model'}; its configuration: {self.output / 'best.yaml'}"
        )
        return 0

    def report(self) -> Path:
        """Write `report.html` and, once a trial has finished, `best.yaml`: a recipe that trains the best one again."""
        from ds_llm.sweeps import report

        if best := self.best():
            saved = self.folder(best.number) / "config.yaml"
            if saved.is_file():
                again = run_config.load(str(saved), [f"output={self.output / 'best'}"])
                (self.output / "best.yaml").write_text(to_yaml(again))
        return report.write(self)


def _drop_torn_line(journal: Path) -> None:
    """Cut off an unfinished last line of the journal, as a power failure leaves it."""
    if journal.is_file() and (data := journal.read_bytes()) and not data.endswith(b"\n"):
        journal.write_bytes(data[: data.rfind(b"\n") + 1])
