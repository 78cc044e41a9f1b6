"""Benchmarks of lm-eval on any loadable model: `launch/evaluate.py harness`.

Prompts, metrics and standard errors are lm-eval's (Gao et al., "A framework for few-shot language model evaluation",
doi:10.5281/zenodo.10256836). The model and its log-likelihoods are ours (`ds_llm.evaluation.harness_model`).
"""

from __future__ import annotations

import difflib
import fnmatch
import io
import logging
import math
import os
import re
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ds_llm import hardware
from ds_llm.distributed.environment import world_size
from ds_llm.errors import UserError
from ds_llm.evaluation.measure import process_group
from ds_llm.pretrained.loading import load_model, load_model_config, load_tokenizer, match_tokenizer, need
from ds_llm.pretrained.source import did_you_mean
from ds_llm.progress import console

TASK_FILES = (".yaml", ".yml")
FEWSHOT_SEED = 1234  # lm-eval's own
THIS = "model"  # column of the model that is evaluated


def harness(
    model_path: str | os.PathLike,
    tasks: Sequence[str],
    *,
    against: dict[str, str] | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    chat_template: bool = False,
) -> dict:
    """Evaluate a model, and those it is compared with, on tasks of lm-eval; the content of the JSON file.

    tasks: names or patterns of lm-eval's tasks, task files (.yaml), folders of them. against: other models by name.
    limit: only the first so many rows of each task. shots: worked examples in each prompt (none: the task's own
    number; a task that sets 0 keeps it). dtype: fp32, bf16, fp16; auto is fp32 on a CPU and the type the model was
    saved in on a GPU. chat_template: prompts are rendered as conversations.

    `results` has one entry for each task (or group) and metric: `values` by model, and `differences`, model minus the
    other, each with its standard error, None where lm-eval gives none. Every rank of a job calls it; each holds whole
    models, one after the other. Mistakes are raised as `UserError`, those that need no weights before any are loaded.
    """
    need("lm_eval", "accelerate", what="lm-eval's tasks:")
    models = {THIS: str(model_path), **(against or {})}
    tokenizers = {}
    for name, path in models.items():
        load_model_config(path)
        tokenizers[name] = load_tokenizer(path)
        if chat_template and tokenizers[name].chat_template is None:
            raise UserError(f"{path}: its tokenizer has no chat template; leave --chat-template out")
    _prepare()
    loaded = load_tasks(tasks)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=own or 0 if shots is None or own == 0 else shots)
    found, about = {}, {}
    with process_group() as device:
        for name, path in models.items():
            if len(models) > 1:
                console.print(f"{name}: {path}")
            options = (device, limit, batch_size, dtype, chat_template)
            found[name], about[name] = _evaluate(path, tokenizers[name], loaded, *options)
    return {
        "models": about,
        "results": compare(found),
        "limit": limit,
        "batch_size": batch_size,
        "chat_template": chat_template,
        "device": hardware.device_name(),
        "world_size": world_size(),
        "lm_eval": version("lm_eval"),
        "environment": hardware.environment(),
    }


def _evaluate(path, tokenizer, loaded, device, limit, batch_size, dtype, chat_template) -> tuple[dict, dict]:
    from ds_llm.compat.lm_eval import evaluate
    from ds_llm.evaluation.harness_model import HarnessModel

    model = load_model(path, "fp32" if dtype == "auto" and device.type == "cpu" else dtype)
    match_tokenizer(model, tokenizer)
    wrapped = HarnessModel(model.to(device), tokenizer, batch_size)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the same examples for every model
    try:
        # examples are turns of the conversation, as on lm-eval's own command line
        options = {"apply_chat_template": chat_template, "fewshot_as_multiturn": chat_template}
        found = evaluate(wrapped, loaded, limit=limit, **options)
    except torch.cuda.OutOfMemoryError:
        raise UserError("the GPU has too little memory for this; lower --batch-size", any_rank=True) from None
    except OSError as error:  # a metric that lm-eval fetches from the hub
        raise UserError(f"lm-eval: {_reason(error)}") from None
    if wrapped.truncated:
        console.print(
            f"warning: {path}: {wrapped.truncated:,} prompts were longer than the model's {wrapped.max_length:,} "
            "positions and lost their beginning"
        )
    about = {
        "path": str(path),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "truncated": wrapped.truncated,
    }
    return found, about


def load_tasks(specs: Sequence[str]) -> dict:
    """lm-eval's tasks and groups with these names, patterns, files and folders, with their data sets loaded.

    Raises `UserError` for missing, broken and repeated tasks, and for a data set that cannot be loaded.
    """
    from ds_llm.compat.lm_eval import TaskManager

    specs = [part for spec in specs for part in spec.split(",") if part]
    paths = {spec: Path(spec).expanduser() for spec in specs}
    folders = [str(path) for path in paths.values() if path.is_dir()]
    by_name = [spec for spec, path in paths.items() if not path.is_dir() and path.suffix not in TASK_FILES]
    if by_name:
        console.print("reading lm-eval's list of tasks")
    manager = TaskManager(include_path=folders or None, include_defaults=bool(by_name))
    built = {"tasks": {}, "groups": {}, "group_map": {}}
    for spec, path in paths.items():
        if path.is_dir():
            inside = [name for name in (*manager.all_groups, *manager.all_subtasks) if _lies_in(manager, name, path)]
            if not inside:
                raise UserError(f"{spec}: holds no task files (.yaml)")
            for name in inside:
                if name not in built["tasks"]:  # of a group before it
                    _add(built, manager, name, spec)
        elif spec in by_name:
            chosen = fnmatch.filter(manager.all_tasks, spec)
            if not chosen:
                close = difflib.get_close_matches(spec, manager.all_tasks, n=1)
                raise UserError(f"task '{spec}': lm-eval has none of this name, nor is it a file{did_you_mean(close)}")
            for name in chosen:
                _add(built, manager, name, spec)
        else:
            if not path.is_file():
                raise UserError(f"{spec}: no such task file")
            if re.search("^group:", path.read_text(encoding="utf-8"), re.MULTILINE):
                raise UserError(f"{spec}: describes a group of tasks; name its folder instead")
            _add(built, manager, str(path), spec)
    return built


def _lies_in(manager, name: str, folder: Path) -> bool:
    path = manager.task_index[name].yaml_path
    return path is not None and path.resolve().is_relative_to(folder.resolve())


def _add(built: dict, manager, name: str, spec: str) -> None:
    try:
        part = manager.load([name])
    except Exception as error:  # from YAML errors to those of any data set's host
        raise UserError(
            f"task {name}: cannot be loaded ({_reason(error)}); without a network use local task files, see "
            "docs/evaluation.md"
        ) from None
    twice = built["tasks"].keys() & part["tasks"].keys()
    if twice:
        raise UserError(f"task {sorted(twice)[0]}: named twice, the second time by {spec}")
    for key, values in part.items():
        built[key].update(values)


def compare(found: dict[str, dict]) -> list[dict]:
    """lm-eval's results for each model as one entry per task and metric, with the differences of the first model."""
    first = found[THIS]
    entries = []
    for task, metrics in first["results"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            rows = {name: _row_values(of, task, metric, kind) for name, of in found.items()}
            values = {
                name: {
                    "value": of["results"][task][key],
                    "stderr": _number(of["results"][task].get(f"{metric}_stderr,{kind}")),
                }
                for name, of in found.items()
            }
            entries.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": kind,
                    "rows": len(_samples(first, task, kind)),
                    "shots": first["n-shot"].get(task),
                    "higher_is_better": (first["higher_is_better"].get(task) or {}).get(metric),
                    "values": values,
                    "differences": {
                        name: {
                            "value": value - values[name]["value"],
                            "stderr": _paired_stderr(rows[THIS], rows[name], value - values[name]["value"]),
                        }
                        for name in found
                        if name != THIS
                    },
                }
            )
    return entries


def _samples(found: dict, task: str, kind: str) -> list[dict]:
    """Rows of a task, or of all tasks of a group, under a filter."""
    children = found["group_subtasks"].get(task)
    if children:
        return [row for child in children for row in _samples(found, child, kind)]
    return [row for row in found["samples"].get(task, ()) if row["filter"] == kind]


def _row_values(found: dict, task: str, metric: str, kind: str) -> list[float] | None:
    values = [row.get(metric) for row in _samples(found, task, kind)]
    return values if values and all(isinstance(v, (int, float)) for v in values) else None


def _paired_stderr(mine: list[float] | None, other: list[float] | None, difference: float) -> float | None:
    """Standard error of the mean paired difference over the rows; None where the metric is no mean over rows.

    Both models have the same rows, so it is much smaller than for two independent samples.
    """
    if not mine or not other or len(mine) != len(other) or len(mine) < 2:
        return None
    differences = [a - b for a, b in zip(mine, other, strict=True)]
    if not math.isclose(statistics.fmean(differences), difference, rel_tol=1e-9, abs_tol=1e-9):
        return None
    return statistics.stdev(differences) / math.sqrt(len(differences))


def describe(result: dict) -> str:
    """A table with values and standard errors of each model, and the differences of the first to the others."""
    others = [name for name in result["models"] if name != THIS]
    shown = Table(box=None, pad_edge=False)
    for title in ("task", "metric"):
        shown.add_column(title)
    for title in ("rows", "shots", THIS, *others, *(f"{THIS} - {name}" for name in others)):
        shown.add_column(title, justify="right", no_wrap=True)
    for entry in result["results"]:
        arrow = {True: " ↑", False: " ↓", None: ""}[entry["higher_is_better"]]
        filtered = "" if entry["filter"] == "none" else f" ({entry['filter']})"
        cells = [_cell(**entry["values"][name]) for name in (THIS, *others)]
        cells += [_cell(**entry["differences"][name], sign="+") for name in others]
        shots = "" if entry["shots"] is None else str(entry["shots"])
        shown.add_row(entry["task"], entry["metric"] + filtered + arrow, f"{entry['rows']:,}", shots, *cells)
    page = Console(file=io.StringIO(), width=1000)
    page.print(shown)
    return "\n".join(line.rstrip() for line in page.file.getvalue().splitlines())


def _cell(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ±{stderr:.4f}")


def _number(value) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")


def _prepare() -> None:
    """Silence lm-eval's log, and keep it from forking, in which a process with threads may hang."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    if os.environ.get("DS_LLM_VERBOSE") != "1":
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
