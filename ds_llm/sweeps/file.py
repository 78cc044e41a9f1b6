"""The sweep file: W&B's format, read strictly and checked against the configuration of its trials.

https://docs.wandb.ai/models/sweeps/sweep-config-keys. Parameter names are the keys of docs/configuration.md; `command`
starts a trial and names the recipe.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from ds_llm.config import options
from ds_llm.config import run as run_config
from ds_llm.config.modes import MODES
from ds_llm.config.run import Config
from ds_llm.config.text_metrics import METRICS as TEXT_METRICS
from ds_llm.config.text_metrics import ROUGE
from ds_llm.errors import ConfigError
from ds_llm.sweeps import hyperband, space
from ds_llm.sweeps.hyperband import Hyperband
from ds_llm.sweeps.space import DISCRETE, Parameter

KEYS = (
    *("program", "command", "method", "metric", "parameters", "early_terminate", "run_cap"),
    *("name", "description", "project", "entity"),
)
ARGUMENTS = "${args_no_hyphens}"
COMMAND = ["${env}", "${interpreter}", "${program}", ARGUMENTS]
PROGRAM = "launch/train.py"
OWN = ("output", "resume")  # keys that the sweep itself sets for each trial
STEP_METRICS = ("loss", "ppl", "grad_norm", "aux_loss", "tokens_per_s", "step_time", "memory_gb", "mfu")


@dataclass(frozen=True)
class Metric:
    """The figure that compares trials: `eval/NAME` of evaluations or `train/NAME` of steps, as in W&B."""

    kind: str  # of the records in metrics.jsonl: eval or step
    field: str
    minimize: bool
    target: float | None = None

    @property
    def name(self) -> str:
        return f"{'eval' if self.kind == 'eval' else 'train'}/{self.field}"

    def better(self, a: float, b: float) -> bool:
        return a < b if self.minimize else a > b


@dataclass(frozen=True)
class SweepFile:
    """The content of a sweep file. raw: as written. fixed: further `key=value` of all trials."""

    path: str
    method: str
    parameters: dict[str, Parameter]
    metric: Metric
    early: Hyperband | None
    command: list[str]
    run_cap: int | None
    fixed: list[str]
    config: Config  # of a trial without the values that vary
    raw: dict

    @property
    def varying(self) -> list[Parameter]:
        return [p for p in self.parameters.values() if p.varies]

    def words(self, values: dict[str, str], *more: str) -> list[str]:
        """The command of a trial with these values; `more` are further `key=value`."""
        return [*expand(self.command, [f"{k}={v}" for k, v in values.items()], self.path), *self.fixed, *more]


def read(path: str, mode: str | None, overrides: list[str]) -> SweepFile:
    """Read and check a sweep file. mode: of all trials, `lora` or one of `Config.mode`; None: the recipe's.

    overrides: `key=value` for all trials. Raises `ConfigError` for unknown keys and impossible values of the file or of
    the configuration, with which every trial would fail.
    """
    raw = _read_yaml(path)
    for name in raw:
        if name not in KEYS:
            near = difflib.get_close_matches(str(name), KEYS, n=1)
            raise ConfigError(f"{path}: unknown key '{name}'; {_meant(near, KEYS)}")
    method = raw.get("method")
    if method not in ("bayes", "random", "grid"):
        raise ConfigError(f"{path}: method: {method!r} is not bayes, random or grid")
    cap = raw.get("run_cap")
    if cap is not None and (type(cap) is not int or cap < 1):
        raise ConfigError(f"{path}: run_cap: {cap!r} must be a whole number of at least 1")
    program = str(raw.get("program", PROGRAM))
    train = Path(__file__).resolve().parents[2] / PROGRAM
    if Path(program).resolve() != train:
        raise ConfigError(f"{path}: program: {program}: trials run {os.path.relpath(train)}")
    command = raw.get("command", COMMAND)
    if not isinstance(command, list) or not all(isinstance(word, (str, int, float)) for word in command):
        raise ConfigError(f"{path}: command: must be a list of words")
    command = [program if str(word) == "${program}" else str(word) for word in command]
    if program not in command or ARGUMENTS not in command:
        raise ConfigError(f"{path}: command: must hold ${{program}} and {ARGUMENTS}, for example {' '.join(COMMAND)}")
    parameters = space.read_parameters(raw.get("parameters"), f"{path}: parameters")
    fixed = [*_mode(mode), *overrides]
    recipe, given = _arguments(expand(command, [], path)[command.index(program) :], path)
    _check_parameters(path, method, parameters, recipe, [*given, *fixed])
    first = [f"{p.name}={p.examples()[0]}" for p in parameters.values()]
    constants = [f"{p.name}={p.examples()[0]}" for p in parameters.values() if not p.varies]
    try:
        resolved = run_config.load(recipe, [*given, *fixed, *constants])
    except ConfigError:  # without the values that vary, a configuration need not fit together
        resolved = run_config.load(recipe, [*given, *fixed, *first])
    metric = _metric(raw.get("metric"), resolved, method, path)
    early = raw.get("early_terminate")
    if early is not None:
        early = hyperband.read(early, f"{path}: early_terminate")
    return SweepFile(path, method, parameters, metric, early, command, cap, fixed, resolved, raw)


def expand(command: list[str], arguments: list[str], where: str) -> list[str]:
    """The words of a command with W&B's macros replaced."""
    words = []
    for word in command:
        if word == ARGUMENTS:
            words += arguments
        elif word == "${env}":
            words.append("/usr/bin/env")
        elif word == "${interpreter}":
            words.append(sys.executable)
        else:
            word = re.sub(r"\$\{envvar:(\w+)\}", lambda m: _environment(m[1], where), word)
            if unknown := re.search(r"\$\{args\w*\}|^\$\{\w+\}$", word):
                raise ConfigError(
                    f"{where}: command: {unknown[0]}: launch/train.py takes key=value; write {ARGUMENTS}"
                    if "args" in unknown[0]
                    else f"{where}: command: {unknown[0]} is not known; there are ${{env}}, ${{interpreter}}, "
                    f"${{program}}, {ARGUMENTS} and ${{envvar:NAME}}"
                )
            words.append(word)
    return words


def _environment(name: str, where: str) -> str:
    if name not in os.environ:
        raise ConfigError(f"{where}: command: the environment variable {name} is not set")
    return os.environ[name]


def _arguments(words: list[str], path: str) -> tuple[str | None, list[str]]:
    """The recipe and the overrides among the arguments of launch/train.py; words[0] is the script."""
    recipe, given, rest = None, [], iter(words[1:])
    for word in rest:
        if word == "--config":
            recipe = next(rest, None)
        elif word.startswith("--config="):
            recipe = word.partition("=")[2]
        elif word.startswith("-"):
            raise ConfigError(f"{path}: command: {word}: only --config and key=value go behind ${{program}}")
        else:
            given.append(word)
    return recipe, given


def _check_parameters(
    path: str, method: str, parameters: dict[str, Parameter], recipe: str | None, given: list
) -> None:
    types = {name: str(f.type) for name, f in options.fields(Config).items()}
    fixed = {word.partition("=")[0] for word in given}
    options.load(Config, recipe, given)  # its own mistakes first
    where = f"{path}: parameters"
    # one value of each parameter at a time: reading a configuration takes some hundredths of a second
    for texts in itertools.zip_longest(*(p.examples() for p in parameters.values())):
        pairs = [f"{name}={text}" for name, text in zip(parameters, texts, strict=True) if text is not None]
        try:
            options.load(Config, recipe, [*given, *pairs])
        except ConfigError as error:
            raise ConfigError(f"{where}: {str(error).removeprefix('command line: ')}") from None
    for name, parameter in parameters.items():
        if name in OWN:
            raise ConfigError(f"{where}: {name}: the sweep sets it for each trial; leave it out")
        if name in fixed:
            raise ConfigError(f"{where}: {name}: is also set to one value, in the command or the arguments")
        ranged = parameter.varies and "values" not in parameter.fields
        if ranged and types[name].startswith("int") and not parameter.whole:
            raise ConfigError(
                f"{where}: {name}: takes whole numbers and {parameter.distribution} draws others; use int_uniform, "
                "values, or a distribution with q: 1"
            )
        if method == "grid" and parameter.distribution not in DISCRETE:
            raise ConfigError(
                f"{where}: {name}: {parameter.distribution} has no grid; use values, int_uniform or q_uniform"
            )


def _metric(section, config: Config, method: str, path: str) -> Metric:
    usual = {"name": f"eval/{MODES[config.mode].goal}"}
    section = section or (usual if method != "bayes" else None)
    where = f"{path}: metric"
    if not isinstance(section, dict) or "name" not in section:
        raise ConfigError(f"{where}: name the figure to compare trials by, for example name: {usual['name']}")
    for key in section:
        if key not in ("name", "goal", "target"):
            raise ConfigError(f"{where}: unknown key '{key}'; there are name, goal and target")
    goal, target = section.get("goal", "minimize"), section.get("target")
    if goal not in ("minimize", "maximize"):
        raise ConfigError(f"{where}: goal: {goal!r} is not minimize or maximize")
    if target is not None and (isinstance(target, bool) or not isinstance(target, (int, float))):
        raise ConfigError(f"{where}: target: {target!r} is not a number")
    known, name = _known(config), str(section["name"])
    if name not in known:
        # the bare name of a figure is nearest to where runs compare it
        near = [k for k in known if k.endswith(f"/{name}")] or difflib.get_close_matches(name, known, n=1)
        raise ConfigError(f"{where}: name: a run has no '{name}'; {_meant(near, known)}")
    kind, _, field = name.partition("/")
    if kind == "eval" and not config.data.val and not MODES[config.mode].holds_out:
        raise ConfigError(f"{where}: name: {name} needs data.val, what the trials evaluate on")
    return Metric("eval" if kind == "eval" else "step", field, goal == "minimize", target)


def _known(config: Config) -> list[str]:
    """Names in W&B of the figures in the records of such a run."""
    mode, own_evaluated, own_steps = MODES[config.mode], (), ()
    if mode.own_figures:
        from ds_llm.train import modes  # imports torch

        own_evaluated, own_steps = modes.module(config.mode).figures(config)
    texts = [f for m in config.eval.generation_metrics for f in (ROUGE if m == "rouge" else (m,)) if m in TEXT_METRICS]
    on_val = (*mode.evaluated, *texts) if config.data.val or not mode.holds_out else ()
    evaluated, steps = (*own_evaluated, *on_val), (*STEP_METRICS, *own_steps)
    return [f"eval/{name}" for name in evaluated] + [f"train/{name}" for name in steps]


def _mode(mode: str | None) -> list[str]:
    if mode is None:
        return []
    modes = modes_known()
    if mode not in modes:
        raise ConfigError(f"--mode: unknown '{mode}'; {_meant(difflib.get_close_matches(mode, modes, n=1), modes)}")
    return ["mode=sft", "lora.enabled=true"] if mode == "lora" else [f"mode={mode}"]


def modes_known() -> list[str]:
    return [*MODES, "lora"]


def _meant(near: list[str], known) -> str:
    return f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"


def _read_yaml(path: str) -> dict:
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such sweep file")
    # as the run's own configuration is read: 1e-3 is a number; the macros of the command stay as they are
    found = OmegaConf.to_container(options.load_yaml(path), resolve=False)
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must hold keys and values, not a list")
    return found
