"""The boosting recipe, from a base model to a stronger one of the same size: `launch/boost.py`.

entropy_0 -> sft -> entropy_1 -> [resample_1 -> weighted -> entropy_2 ->] merge -> resample -> fuse -> fused -> extract,
then plain (fine-tuning alone, for as many steps) and compare. Each stage is a command or a function with a result in
the output folder. OUTPUT/.stages/NAME.json holds the settings of a finished stage. A rerun continues behind the last
finished stage; an unfinished one continues as its command does.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from ds_llm.boosting.resample import ResampleConfig
from ds_llm.config.options import key
from ds_llm.data.resumable import dump, write_atomically
from ds_llm.errors import ConfigError, UserError
from ds_llm.progress import console, duration

OPTIONAL = ("plain", "compare")


@dataclass
class BoostingConfig:
    output: str = key("runs/boost", "Folder of the recipe: scores, resampled data, models, report")
    base: str = key("", "Model it begins with: folder, run or hub name")
    train: list[str] = key([], "Conversations, prompts or texts to train on")
    val: list[str] = key([], "Held-out rows of the same kind, on which the models are compared")
    launcher: str = key("deepspeed --quiet", "Command that starts the processes: deepspeed, torchrun or python")
    recipe: str = key("ds_configs/recipes/sft.yaml", "Configuration that all training stages share")
    training: list[str] = key([], "key=value for every training stage, such as data.seq_len=256")
    sft: list[str] = key([], "key=value for the first training only")
    weighted: list[str] = key([], "key=value for the training on rows drawn after the first, see weighted_sft")
    fused: list[str] = key(["model.freeze=[sub_models.0]"], "key=value for the training of the fused model only")
    score: list[str] = key([], "score.key=value for every scoring stage, such as score.max_length=256")
    weighted_sft: bool = key(
        False, "Train once more on rows drawn by adaboost, before the fusion; brownboost compares three models"
    )
    fusion_lambda: float = key(0.5, "Weight of the trained model in the vote with the base", at_least=0, at_most=1)
    connection: str = key("none", "How the trained model is fed by the base", choices=("none", "linear", "gated"))
    resample: ResampleConfig = field(default_factory=ResampleConfig)
    skip: list[str] = key([], "Stages that are left out: plain, compare, or one whose result is in the output already")


@dataclass(frozen=True)
class Stage:
    """One stage. product: its result. settings: with those of the stages in `after`, everything that the result depends
    on. run: does the work."""

    name: str
    product: Path
    settings: dict
    after: tuple[str, ...]
    run: Callable[[], None]


class Recipe:
    """The stages of a configuration. launch: folder of the launch scripts."""

    def __init__(self, config: BoostingConfig, launch: Path):
        self.config, self.launch, self.output = config, launch, Path(config.output)
        _check(config)
        self.stages = {stage.name: stage for stage in self._stages()}
        for name in config.skip:
            if name not in self.stages:
                raise ConfigError(f"skip: '{name}' is no stage of this recipe; they are {', '.join(self.stages)}")

    def run(self) -> dict | None:
        """Run the unfinished stages. Returns the report; None where compare is skipped.

        Raises `UserError` where a stage fails (with its command's exit code) or was finished with other settings.
        """
        done = self.output / ".stages"
        done.mkdir(parents=True, exist_ok=True)
        for number, stage in enumerate(self.stages.values(), 1):
            title = f"[{number}/{len(self.stages)}] {stage.name}"
            stamp, wanted = done / f"{stage.name}.json", self._key(stage)
            if stage.name in self.config.skip:
                if stage.name not in OPTIONAL and not stage.product.exists():
                    raise UserError(f"skip: {stage.name} leaves {stage.product}, which is not there; put it there")
                console.print(f"{title}: left out")
                continue
            if stamp.is_file():
                self._check_same(stage, json.loads(stamp.read_text()), wanted)
                console.print(f"{title}: finished before")
                continue
            console.print(f"{title}", style="bold")
            start = time.monotonic()
            stage.run()
            seconds = time.monotonic() - start
            write_atomically(stamp, dump({"settings": wanted, "seconds": seconds}))
            console.print(f"{title}: done in {duration(seconds)}")
        report = self.output / "report.json"
        return json.loads(report.read_text()) if "compare" not in self.config.skip and report.is_file() else None

    def redo(self, name: str) -> None:
        """Remove the results of a stage and of those that depend on it."""
        if name not in self.stages:
            raise ConfigError(f"--redo {name}: is no stage of this recipe; they are {', '.join(self.stages)}")
        gone = {name}
        for stage in self.stages.values():
            if gone & set(stage.after):
                gone.add(stage.name)
        for other in gone:
            product = self.stages[other].product
            (self.output / ".stages" / f"{other}.json").unlink(missing_ok=True)
            left = list(product.parent.glob(f"{product.name}*"))
            for path in [*left, self.output / "compare"] if other == "compare" else left:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    def _key(self, stage: Stage) -> dict:
        earlier = {name: self._key(self.stages[name]) for name in stage.after}
        text = json.dumps(earlier, sort_keys=True).encode()
        return {**stage.settings, "after": hashlib.sha256(text).hexdigest() if earlier else ""}

    def _check_same(self, stage: Stage, stamp: dict, wanted: dict) -> None:
        if not stage.product.exists():
            raise UserError(f"{stage.product}: is gone; run the stage again with --redo {stage.name}")
        found = stamp["settings"]
        changed = [k for k in sorted(found.keys() | wanted.keys()) if found.get(k) != wanted.get(k)]
        if changed:
            what = "an earlier stage" if changed == ["after"] else ", ".join(k for k in changed if k != "after")
            raise UserError(
                f"stage {stage.name} was finished with other settings ({what}); --redo {stage.name} runs it and what "
                "depends on it again, or choose another output"
            )

    # -- the stages -----------------------------------------------------------------------------------------------

    def _stages(self) -> list[Stage]:
        from ds_llm.boosting import resample as rows
        from ds_llm.convert import boost as convert

        c, out = self.config, self.output
        scores = {f"entropy_{i}": out / f"entropy_{i}.jsonl" for i in range(3 if c.weighted_sft else 2)}
        stages = [self._score("entropy_0", c.base, ()), self._train("sft", c.base, c.train, c.sft, ())]
        stages.append(self._score("entropy_1", out / "sft", ("sft",)))
        strong = "sft"
        if c.weighted_sft:
            first = ResampleConfig(multiplier=c.resample.multiplier, seed=c.resample.seed)
            pair = {name: scores[name] for name in ("entropy_0", "entropy_1")}
            stages += [
                self._resample("resample_1", first, lambda: rows.merge(pair), tuple(pair)),
                self._train(
                    "weighted", out / "sft", [str(out / "resample_1.jsonl")], c.weighted, ("sft", "resample_1")
                ),
                self._score("entropy_2", out / "weighted", ("weighted",)),
            ]
            strong = "weighted"
        merged = out / "scores.jsonl"
        stages.append(Stage("merge", merged, {}, tuple(scores), lambda: rows.write(rows.merge(scores), merged)))
        together = dict.fromkeys(scores, merged)
        stages.append(self._resample("resample", c.resample, lambda: rows.merge(together), ("merge",)))
        connection = None if c.connection == "none" else c.connection

        def fuse() -> None:
            models = [c.base, out / strong]
            found = convert.boost(models, out / "vote", fusion_lambda=c.fusion_lambda, connection=connection)
            console.print(f"fused against the vote: largest difference of the logits {found.made:.3g}")

        def extract() -> None:
            found = convert.extract(out / "fused", -1, out / "extracted", drop_connection=connection is not None)
            console.print(f"by itself against in the ensemble: largest difference {found.made:.3g}")

        how = {"fusion_lambda": c.fusion_lambda, "connection": c.connection}
        drawn = [str(out / "resample.jsonl")]
        stages += [
            Stage("fuse", out / "vote", how, (strong,), fuse),
            self._train("fused", out / "vote", drawn, c.fused, ("fuse", "resample")),
            Stage("extract", out / "extracted", {}, ("fused",), extract),
            self._plain(("sft", "weighted", "fused") if c.weighted_sft else ("sft", "fused")),
            self._compare(),
        ]
        return stages

    def _score(self, name: str, model, after: tuple[str, ...]) -> Stage:
        product = self.output / f"{name}.jsonl"
        run = lambda: self._measure(model, self.config.train, "entropy", name, product)  # noqa: E731
        return Stage(name, product, self._inputs(model) | {"score": self.config.score}, after, run)

    def _measure(self, model, data: list[str], metric: str, name: str, out: Path) -> None:
        arguments = ["--model", str(model), "--data", *data, "--metric", metric, "--field", name, "--out", str(out)]
        self._command("score.py", [*arguments, "--only-idx", *self.config.score])

    def _train(self, name: str, model, data: list[str], overrides: list[str], after: tuple[str, ...]) -> Stage:
        recipe = Path(self.config.recipe)
        settings = self._inputs(model) | {
            "recipe": recipe.read_text(),
            "overrides": [*self.config.training, *overrides],
        }
        run = lambda: self._fit(name, model, data, overrides)  # noqa: E731
        return Stage(name, self.output / name, settings, after, run)

    def _fit(self, name: str, model, data: list[str], overrides: list[str]) -> None:
        fixed = {"mode": "sft", "output": str(self.output / name), "model.path": str(model), "data.train": data}
        fixed["data.val"] = self.config.val
        given = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in fixed.items()]
        self._command("train.py", ["--config", self.config.recipe, *given, *self.config.training, *overrides])

    def _resample(self, name: str, config: ResampleConfig, scores: Callable, after: tuple[str, ...]) -> Stage:
        from ds_llm.boosting import resample as rows

        product = self.output / f"{name}.jsonl"

        def run() -> None:
            rows.show(rows.resample(self.config.train, scores(), product, config))

        return Stage(name, product, asdict(config), after, run)

    def _plain(self, trained: tuple[str, ...]) -> Stage:
        """Fine-tune the base on the unchanged data, for as many steps as all other trainings together."""
        from ds_llm.checkpoint import folder as checkpoint

        c = self.config
        stage = self._train("plain", c.base, c.train, c.sft, trained)

        def run() -> None:
            steps = sum(checkpoint.steps(self.output / name)[0] for name in trained)
            self._fit("plain", c.base, c.train, [*c.sft, f"train.max_steps={steps}"])

        return Stage("plain", stage.product, stage.settings, stage.after, run)

    def _compare(self) -> Stage:
        from ds_llm.boosting import report as boosting_report

        c, out = self.config, self.output
        models = {"base": c.base, "sft": out / "sft"}
        if c.weighted_sft:
            models["weighted"] = out / "weighted"
        models |= {"vote": out / "vote", "boosted": out / "fused", "extracted": out / "extracted"}
        if "plain" not in c.skip:
            models["plain"] = out / "plain"
        after = tuple(name for name in ("sft", "weighted", "fuse", "fused", "extract", "plain") if name not in c.skip)
        after = tuple(name for name in after if name != "weighted" or c.weighted_sft)

        def run() -> None:
            for name, model in models.items():
                console.print(f"held-out loss of {name}")
                self._measure(model, c.val, "logprob", "logprob", out / "compare" / f"{name}.jsonl")
            report = boosting_report.build(out, list(models), list(self.stages))
            write_atomically(out / "report.json", dump(report))
            boosting_report.show(report)

        settings = {"val": _content(c.val), "score": c.score, "models": list(models)}
        return Stage("compare", out / "report.json", settings, after, run)

    def _inputs(self, model) -> dict:
        from ds_llm.pretrained.fingerprint import identity

        found = {"train": self._data}
        return found | ({"base": identity(self.config.base)} if model == self.config.base else {})

    @cached_property
    def _data(self) -> str:
        return _content(self.config.train)

    def _command(self, script: str, arguments: list[str]) -> None:
        """Run a launch script to its end under the launcher; SIGTERM and Ctrl-C are passed on to it."""
        words = shlex.split(self.config.launcher)
        program = sys.executable if words[0] == "python" else str(Path(sys.executable).parent / words[0])
        if words[0] == "deepspeed" and not any("master_port" in word for word in words):
            words += ["--master_port", str(_free_port())]
        command = [program, *words[1:], str(self.launch / script), *arguments]
        console.print(f"$ {shlex.join(command)}", style="dim")
        child = subprocess.Popen(command)
        before = {n: signal.signal(n, lambda n, _: child.send_signal(n)) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if code:
            code = code if code > 0 else 128 - code  # as a shell counts a signal
            raise UserError(f"{script} ended with exit code {code}; the same command goes on from here", exit_code=code)


def _check(config: BoostingConfig) -> None:
    for name in ("base", "train", "val"):
        if not getattr(config, name):
            raise ConfigError(f"{name}: not given")
    if config.resample.method == "brownboost" and not config.weighted_sft:
        raise ConfigError("resample.method: brownboost compares three models; set weighted_sft=true")
    if not Path(config.recipe).is_file():
        raise ConfigError(f"recipe: {config.recipe}: no such file")
    words = shlex.split(config.launcher)
    if not words or words[0] not in ("deepspeed", "torchrun", "python"):
        raise ConfigError(f"launcher: '{config.launcher}' must begin with deepspeed, torchrun or python")


def _content(data: list[str]) -> str:
    from ds_llm.data.corpora import cache_folder
    from ds_llm.data.sources import digests, resolve

    return ",".join(digests(resolve(data), cache_folder()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
