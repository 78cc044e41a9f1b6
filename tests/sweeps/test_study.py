"""Whole sweeps of real trainings: what they leave, that they go on after a crash, and what the report says."""

import itertools
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import forked
import jobs
import numpy as np
import pytest
from omegaconf import OmegaConf

from ds_llm.config.options import flatten, to_dict
from ds_llm.config.run import Config, load
from ds_llm.distributed.interrupt import EXIT_CODE
from ds_llm.errors import UserError
from ds_llm.sweeps import file, study, trial
from ds_llm.tracking import metrics_file as metrics

optuna = pytest.importorskip("optuna")


PASSED = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "DS_LLM_EXTENSIONS")  # of the environment of a trial
# for DS_LLM_EXTENSIONS: the second trial waits at a step until it is asked to stop, or `GO` exists
STAND_STILL = """
import time
from pathlib import Path
from ds_llm.train import trainer
step = trainer.Trainer._step

def held(self):
    while (self.output.name, self.state["step"]) == ("0001", STEP) and not Path(GO).exists():
        if self.interrupt.requested():
            break
        time.sleep(0.01)
    return step(self)

trainer.Trainer._step = held
"""


class Process(forked.Job):
    """A trial's process, started without the seconds that importing takes; takes what `subprocess.Popen` takes."""

    started: ClassVar[list[dict]] = []

    def __init__(self, words, env, stdout, **_):
        given = {name: env[name] for name in PASSED if name in env}
        Process.started.append(given)
        self._log = os.dup(stdout.fileno())
        script = next(i for i, word in enumerate(words) if word.endswith("train.py"))
        super().__init__(1, [str(jobs.ROOT / words[script]), *words[script + 1 :]], jobs.environment(**given))

    @property
    def returncode(self):
        code = forked.Job.returncode.fget(self)
        if code is not None and self._log is not None:
            for text in self.communicate():
                os.write(self._log, text.encode())
            os.close(self._log)
            self._log = None
        return code

    def poll(self):
        return self.returncode

    def wait(self):
        self._leader.join()
        return self.returncode


@pytest.fixture
def sweep(tmp_path, tiny, monkeypatch):
    """Makes a sweep of tiny trainings of 6 steps with 3 evaluations; keywords are keys of the sweep file."""
    monkeypatch.chdir(jobs.ROOT)
    monkeypatch.setattr(trial.subprocess, "Popen", Process)
    monkeypatch.setattr(study, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(study, "Interrupt", Interrupt)
    short = ["train.max_steps=6", "eval.every_steps=2", "eval.before=false", "checkpoint.every_steps=2", "zero=0"]
    short += ["eval.max_windows=8", "checkpoint.keep=1"]
    Process.started.clear()

    def make(count=None, slots=(None,), output="out", more=(), **keys):
        path = tmp_path / "sweep.yaml"
        OmegaConf.save(OmegaConf.create({"metric": {"name": "eval/perplexity"}, **keys}), path)
        fixed = [w for w in [*tiny, *short, *more] if w.partition("=")[0] not in keys["parameters"]]
        return study.Sweep(file.read(str(path), None, fixed), tmp_path / output, count, list(slots))

    return make


@pytest.fixture
def stand_still(tmp_path, monkeypatch):
    """stand_still(step): the second trial waits there; returns the file that lets it go on."""

    def make(step: int) -> Path:
        go, extension = tmp_path / "go", tmp_path / "stand_still.py"
        extension.write_text(STAND_STILL.replace("STEP", str(step)).replace("GO", repr(str(go))))
        monkeypatch.setenv("DS_LLM_EXTENSIONS", str(extension))
        return go

    return make


class Interrupt:
    """Asks to stop when `due` says so; the signals of the tests' process stay its own."""

    due, reason = staticmethod(lambda: False), "SIGTERM"

    def requested(self):
        return Interrupt.due()


class Page(HTMLParser):
    """The rows of a page's tables by id, and its pictures' names."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.pictures, self._table, self._cell = {}, [], None, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "table":
            self._table = self.tables.setdefault(attrs.get("id"), [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
            self._cell = True
        elif tag == "svg":
            self.pictures.append(attrs["aria-label"])

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._cell:
            self._table[-1][-1] += data.strip()


def perplexities(folder: Path) -> list[float]:
    return [r["perplexity"] for r in metrics.read(folder / "metrics.jsonl") if r["kind"] == "eval"]


def test_a_sweep_of_real_trainings(sweep, tmp_path, capsys):
    """Two at a time, some with a configuration that fails."""
    parameters = {
        "optim.lr": {"values": [1e-2, 1e-7]},
        "model.n_heads": {"values": [4, 5]},  # 32 is no multiple of 5
        "data.isolate_documents": {"value": False},
    }
    made = sweep(slots=("3", "5"), method="grid", parameters=parameters)
    assert made.run() == 0
    out, found = tmp_path / "out", made.study.trials
    order = [(t.user_attrs["values"]["optim.lr"], t.user_attrs["values"]["model.n_heads"]) for t in found]
    assert order == list(itertools.product(["0.01", "1e-07"], ["4", "5"]))
    assert [t.state.name for t in found] == ["COMPLETE", "FAIL"] * 2
    assert {s.get("CUDA_VISIBLE_DEVICES") for s in Process.started} == {"3", "5"}
    for number in (0, 2):
        measured = perplexities(out / f"trials/000{number}")
        assert len(measured) == 3 and found[number].value == min(measured)
        assert found[number].intermediate_values == dict(enumerate(measured, 1))
    for number in (1, 3):
        reason = "model.dim: 32 is not divisible by model.n_heads=5 (exit code 2)"
        assert found[number].user_attrs["reason"] == reason
    # the recipe of the best one is that trial's, in another folder
    again = flatten(Config, to_dict(load(str(out / "best.yaml"))))
    trained = flatten(Config, to_dict(load(str(out / "trials/0000/config.yaml"))))
    assert again.pop("output") == str(out / "best") and trained.pop("output") and again == trained
    assert again["data.isolate_documents"] is False and again["optim.lr"] == 0.01
    page = Page((out / "report.html").read_text())
    head, *rows = page.tables["trials"]
    assert head == ["trial", "eval/perplexity", "optim.lr", "model.n_heads", "steps", "time", ""]
    assert [row[0] for row in rows] == ["0", "2", "1", "3"]  # from the best to the worst, then what failed
    assert rows[0][1:5] == [f"{found[0].value:.6g}", "0.01", "4", "6"] and rows[0][-1] == "best"
    assert "is not divisible" in rows[2][-1]
    assert "trials: 2 finished, 0 ended early, 2 failed" in capsys.readouterr().out
    # the same command again does nothing more, another sweep is not mixed into this one
    started = len(Process.started)
    assert sweep(method="grid", parameters=parameters).run() == 0 and len(Process.started) == started
    early = {"type": "hyperband", "min_iter": 1}
    for other in ({"early_terminate": early}, {"metric": {"name": "eval/loss"}}, {"more": ["optim.eps=1e-9"]}):
        with pytest.raises(UserError, match="was started with another"):
            sweep(method="grid", parameters=parameters, **other).run()


def test_a_trial_that_falls_behind_is_ended_and_a_target_ends_the_sweep(sweep, tmp_path, stand_still):
    stand_still(140)
    parameters = {"optim.lr": {"values": [1e-2, 1e-9, 1e-8]}}
    early = {"type": "hyperband", "min_iter": 1, "eta": 3}
    more = ["train.max_steps=150", "eval.every_steps=10", "checkpoint.every_steps=0"]
    assert sweep(2, method="grid", parameters=parameters, early_terminate=early, more=more).run() == 0
    made = sweep(2, method="grid", parameters=parameters, early_terminate=early, more=more)
    made._open()
    first, second = made.study.trials
    assert (first.state.name, second.state.name) == ("COMPLETE", "PRUNED")
    assert "the best 1/3 of 2 trials have" in second.user_attrs["reason"] and second.user_attrs["steps"] < 150
    events = [r for r in metrics.read(tmp_path / "out/trials/0001/metrics.jsonl") if r["kind"] == "event"]
    assert events[-1]["event"] == "interrupt"  # it saved
    # a target that the first trial has reached: no other one is begun
    metric = {"name": "train/loss", "target": 100.0}
    made = sweep(3, output="target", method="grid", parameters=parameters, metric=metric)
    assert made.run() == 0 and len(made.study.trials) == 1
    losses = [r["loss"] for r in metrics.read(tmp_path / "target/trials/0000/metrics.jsonl") if r["kind"] == "step"]
    assert made.study.trials[0].value == pytest.approx(np.mean(losses))


def test_a_sweep_goes_on_after_a_crash_and_after_an_interruption(sweep, tmp_path, monkeypatch, stand_still):
    go = stand_still(30)
    parameters = {
        "optim.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "optim.weight_decay": {"values": [0.0, 0.1]},
    }
    settings = {
        "method": "random",
        "parameters": parameters,
        "more": ["train.max_steps=60", "eval.every_steps=10", "checkpoint.every_steps=0"],
    }
    out, polls = tmp_path / "out", []

    def crash(seconds):
        polls.append(seconds)
        wait(seconds)
        done = out / "trials/0001/metrics.jsonl"
        if done.is_file() and perplexities(out / "trials/0001"):  # in the middle of the second trial
            raise MemoryError

    wait = time.sleep
    with monkeypatch.context() as patch:
        patch.setattr(study.time, "sleep", crash)
        with pytest.raises(MemoryError):
            sweep(3, **settings).run()
    # what a power cut leaves: half a line, and the lock of a process that is gone
    with open(out / "study.log", "ab") as journal:
        journal.write(b'{"op_code": 5, "wor')
    os.symlink("nothing", out / "study.log.lock")

    def starts(number: int) -> int:
        return len(re.findall(rb"^\$ ", (out / f"trials/000{number}/log.txt").read_bytes(), re.M))

    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "due", lambda: starts(1) == 2 and bool(perplexities(out / "trials/0001")))
        assert sweep(3, **settings).run() == EXIT_CODE
    go.touch()
    made = sweep(3, **settings)
    assert made.run() == 0
    assert [t.state.name for t in made.study.trials] == ["COMPLETE"] * 3
    assert (starts(0), starts(2)) == (1, 1) and starts(1) >= 2
    assert sum(map(starts, range(3))) == len(Process.started)
    for number, found in enumerate(made.study.trials):
        records = metrics.read(out / f"trials/000{number}/metrics.jsonl")
        assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 61))
        # what an undisturbed sweep would have drawn
        fresh = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=number)).ask()
        assert found.user_attrs["values"] == {p.name: p.suggest(fresh) for p in made.file.varying}
    assert any(r.get("event") == "resume" for r in metrics.read(out / "trials/0001/metrics.jsonl"))


def test_a_sweep_whose_trials_all_fail_gives_up(sweep, tmp_path):
    parameters = {"model.n_heads": {"values": [5, 7, 9, 11, 13]}}
    with pytest.raises(UserError, match="3 trials failed and none succeeded, the last one: model"):
        sweep(method="grid", parameters=parameters).run()
    assert len(Process.started) == 3


def test_bayes_comes_closer_to_the_optimum_than_chance(sweep):
    """Without processes: the values that are asked for, told a known function of them."""
    parameters = {
        "optim.lr": {"distribution": "log_uniform_values", "min": 1e-6, "max": 1e-1},
        "model.dropout": {"min": 0.0, "max": 0.9},
        "optim.betas": {"values": [[0.9, 0.95], [0.9, 0.999]]},
    }
    misses = {}
    for method in ("bayes", "random"):
        made = sweep(40, output=method, method=method, parameters=parameters)
        made.output.mkdir()
        made._open()
        for _ in range(40):
            asked = made._ask(None)
            values = made._values(asked)
            wrong = values["optim.betas"] != "[0.9, 0.999]"
            distance = (np.log10(float(values["optim.lr"])) + 3) ** 2 + 0.5 * float(values["model.dropout"]) + wrong
            asked.set_user_attr("values", values)
            made.study.tell(asked, 10 + distance)
        misses[method] = np.mean([t.value for t in made.study.trials[-15:]]) - 10
        made.report()
        page = (made.output / "report.html").read_text()
        names = ["Best value so far", "Importance of the parameters", "Parallel coordinates"]
        assert Page(page).pictures == names
        shares = re.search(r'aria-label="Importance.*?</svg>', page, re.DOTALL)[0]
        assert sum(int(n) for n in re.findall(r">\s*(\d+)%", shares)) == pytest.approx(100, abs=2)
        assert re.search(r'aria-label="Parallel.*?>\s*optim.lr\s*<', page, re.DOTALL)
        best = made.best().user_attrs["values"]
        assert f"optim.lr: {best['optim.lr']}" in page and f"optim.lr={best['optim.lr']} " in page
    assert misses["bayes"] < 0.6 * misses["random"]
    assert "src=" not in page and "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|http-equiv', "", page)


def test_the_command(tmp_path):
    """`launch/sweep.py` itself: mistakes are one line, and so is a W&B that cannot be reached."""
    path = tmp_path / "s.yaml"
    path.write_text("method: random\nmetric: {name: eval/perplexity}\nparameters: {optim.lr: {min: 1e-4, max: 1e-3}}\n")
    calls = [
        ([], 2, "--config: name a sweep file"),
        (["--mode", "nothing"], 2, "nothing.yaml: no such sweep file"),
        (["--config", str(path), "--count", "0"], 2, "--count: 0 must be at least 1"),
        (["--config", str(path)], 2, "--count: say how many trials"),
        (["--config", str(path), "--count", "1", "--gpus", "0"], 2, "there is no GPU here; --parallel N"),
        (["--config", str(path), "--count", "1", "--wandb"], 1, "without --wandb the sweep runs on this machine alone"),
    ]
    script = jobs.ROOT / "launch" / "sweep.py"
    running = []
    for arguments, _, _ in calls:
        place = [f"--output={tmp_path / 'out'}", "data.val=val.bin"] if arguments else []
        env = {"WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": ""}
        running.append(jobs.start("forked-1", [*arguments, *place], script=script, **env))
    for (_, code, text), job in zip(calls, running, strict=True):
        out, err = job.communicate(timeout=jobs.PATIENCE)
        assert job.returncode == code, (out, err)
        assert text in err and err.startswith("error: ") and err.count("\n") == 1
