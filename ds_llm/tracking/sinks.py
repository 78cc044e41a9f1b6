"""Where the records of a run go beside the metrics file: the console, TensorBoard, Weights & Biases.

Each class takes the records of `ds_llm.tracking.tracker.Tracker` through `step`, `eval`, `event` and `summary`; `sync`
puts what was taken on the disk and `close` ends it. They exist on rank 0 only.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ds_llm.config.options import to_dict, to_yaml
from ds_llm.config.run import Config
from ds_llm.config.text_metrics import LABELS
from ds_llm.errors import UserError
from ds_llm.progress import console, duration

SHOWN_SAMPLE = 300  # characters of a generated sample on the console; the record has it whole


class Console:
    """On a terminal a bar with a live line of figures below; elsewhere a line every `log_every` steps."""

    def __init__(self, total_steps: int, start_step: int, log_every: int):
        self._total, self._every = total_steps, log_every
        self._live, self._figures = None, Text("")
        if console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} steps"),
                TextColumn("epoch {task.fields[epoch]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[eta]}"),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, epoch="0.00", eta="")
            self.start()

    def start(self) -> None:
        if console.is_terminal and self._live is None:
            self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)
            self._live.start()

    def stop(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def step(self, r: dict) -> None:
        step = r["step"]
        if console.is_terminal:
            left = f"{duration(r['eta'])} left" if r.get("eta") is not None else ""
            self._bar.update(self._task, completed=step, epoch=f"{r.get('epoch', 0):.2f}", eta=left)
            self._figures = Text("  " + "  ".join(figures(r)), style="cyan", overflow="fold")
        elif step % self._every == 0 or step in (1, self._total):
            left = [f"{duration(r['eta'])} left"] if r.get("eta") is not None else []
            head = [f"step {step}/{self._total}", f"epoch {r.get('epoch', 0):.2f}"]
            console.print("  ".join(head + figures(r) + left), markup=False)

    def eval(self, r: dict) -> None:
        goal = r.get("goal", "perplexity")
        parts = [
            f"evaluation  step {r['step']}",
            f"epoch {r.get('epoch', 0):.2f}",
            f"{goal} {_number(r[goal])}",
        ]
        if r.get("accuracy") is not None:
            parts.append(f"accuracy {r['accuracy']:.1%}")
        parts += [f"{label} {r[name]:.2f}" for name, label in LABELS.items() if r.get(name) is not None]
        if r["step"] == 0:
            parts.append("the baseline")
        elif r.get(f"baseline_{goal}") is not None and r.get("trend_percent") is not None:
            parts.append(f"{r['trend_percent']:+.1f} % against the baseline {_number(r[f'baseline_{goal}'])}")
        if r["step"] and r.get(f"best_{goal}") is not None:
            best = r[goal] is not None and r[goal] <= r[f"best_{goal}"]
            parts.append("best so far" if best else f"best {_number(r[f'best_{goal}'])}")
        console.print("  ".join(parts), style="bold", markup=False)
        for sample in r.get("samples") or []:
            text = " ".join(sample["text"].split()) or "(no text)"
            text = text if len(text) <= SHOWN_SAMPLE else text[:SHOWN_SAMPLE] + " …"
            console.print(f"  {sample['prompt']!r} → {text}", markup=False)

    def event(self, r: dict) -> None:
        if r.get("message"):
            console.print(f"{r['event']}: {r['message']}", markup=False)

    def summary(self, r: dict) -> None:
        self.stop()
        table = Table(title="Summary", show_header=False, title_justify="left")
        for name, value in r.items():
            if name not in ("kind", "time") and not isinstance(value, (dict, list)):
                shown = f"{value:,}" if type(value) is int else str(value)
                table.add_row(name.replace("_", " "), _number(value) if isinstance(value, float) else shown)
        console.print(table)

    def sync(self) -> None:
        pass  # the console holds nothing back

    def close(self, exit_code: int) -> None:
        self.stop()

    def _render(self) -> Group:
        return Group(self._bar, self._figures)


def figures(r: dict) -> list[str]:
    """The figures of a step record that it has, each ready to print."""
    shown = []
    for name, label, form in (
        ("loss", "loss", lambda v: f"{v:.4f}"),
        ("ppl", "ppl", _number),
        ("margin", "margin", lambda v: f"{v:+.3f}"),
        ("accuracy", "acc", lambda v: f"{v:.1%}"),
        ("aux_loss", "aux", lambda v: f"{v:.4f}"),
        ("quality_loss", "quality", lambda v: f"{v:.4f}"),
        ("lr", "lr", lambda v: f"{v:.2e}"),
        ("grad_norm", "grad", lambda v: f"{v:.3f}"),
        ("tokens_per_s", "", lambda v: f"{v:,.0f} tok/s"),
        ("mfu", "MFU", lambda v: f"{v:.1%}"),
        ("memory_gb", "mem", lambda v: f"{v:.2f} GB"),
        ("skipped", "skipped:", str),
    ):
        if name in r and (r[name] is not None or name == "loss") and r[name] is not False:
            value = "not finite" if r[name] is None else form(r[name])
            shown.append(f"{label} {value}".strip())
    return shown


class TensorBoard:
    """Event files in `<output>/tensorboard`; steps after the one continued from are purged."""

    def __init__(self, config: Config, output: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        _let_writers_fail_quietly()
        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=start_step + 1 if start_step else 0)
        if not start_step:
            self._writer.add_text("config", f"```yaml\n{to_yaml(config)}```", 0)

    def step(self, r: dict) -> None:
        for name, value in _prefixed("train", r).items():
            self._writer.add_scalar(name, value, r["step"], r["time"])

    def eval(self, r: dict) -> None:
        for name, value in _prefixed("eval", r).items():
            self._writer.add_scalar(name, value, r["step"], r["time"])
        for number, sample in enumerate(r.get("samples") or []):
            text = f"**{sample['prompt']}**\n\n{sample['text']}"
            self._writer.add_text(f"sample/{number}", text, r["step"], r["time"])

    def event(self, r: dict) -> None:
        if r.get("message"):
            self._writer.add_text(f"event/{r['event']}", r["message"], r.get("step"), r["time"])

    def summary(self, r: dict) -> None:
        rows = "".join(f"| {k} | {v} |\n" for k, v in r.items() if k not in ("kind", "time"))
        self._writer.add_text("summary", f"| | |\n|---|---|\n{rows}", r.get("step"), r["time"])

    def sync(self) -> None:
        self._writer.flush()

    def close(self, exit_code: int) -> None:
        self._writer.close()


@functools.cache
def _let_writers_fail_quietly() -> None:
    """What goes wrong in TensorBoard's thread is raised where something is written next; no traceback before that."""
    from ds_llm.compat.tensorboard import _AsyncWriterThread

    before = threading.excepthook

    def hook(arguments) -> None:
        if not isinstance(arguments.thread, _AsyncWriterThread):
            before(arguments)

    threading.excepthook = hook


def check_wandb(config: Config) -> None:
    """Raise `UserError` if W&B is asked for what it cannot do here. Cheap; called on every rank."""
    options = config.tracking.wandb
    if not options.enabled:
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError("tracking.wandb.enabled: wandb is not installed; pip install 'ds_llm[wandb]'")
    if options.watch != "none" and config.zero == 3:
        raise UserError(
            f"tracking.wandb.watch: {options.watch} needs whole tensors, which ZeRO stage 3 partitions; "
            "set it to none or use zero=2"
        )


class Wandb:
    """A Weights & Biases run whose id is kept in `<output>/wandb_id`, so a continued run goes on in the same place.

    Points carry the training step as their own axis: W&B's internal step cannot go back to a checkpoint.
    """

    def __init__(self, config: Config, output: Path, start_step: int, run_info: dict):
        import wandb

        self._wandb, self._options = wandb, config.tracking.wandb
        self._accumulation = config.train.accumulation_steps
        self._watched, self._due = None, 0  # the model, and the step of its next histograms
        id_file = output / "wandb_id"
        identity = id_file.read_text(encoding="utf-8").strip() if start_step and id_file.is_file() else None
        output.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=self._options.project,
                name=self._options.run_name or output.resolve().name,
                id=identity,
                mode=self._options.mode,
                resume="allow" if self._options.mode == "online" else None,
                dir=str(output),
                config={**to_dict(config), "run": run_info},
                settings=wandb.Settings(console="off"),  # the progress display is not a log
            )
        except wandb.errors.Error as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"Weights & Biases could not start ({reason}); "
                "log in with `wandb login` or set tracking.wandb.mode=offline"
            ) from None
        id_file.write_text(self._run.id + "\n", encoding="utf-8")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("eval/perplexity", step_metric="step", summary="min")
        self._run.define_metric("eval/accuracy", step_metric="step", summary="max")
        if self._options.log_code:
            self._run.log_artifact(self._code(config))

    def watch(self, model) -> None:
        """Ask for histograms. Those of gradients come from W&B's hooks on the parameters; those of parameters are taken
        in `step`, since W&B's hook needs the model's forward, which a loss on top of its backbone does not call."""
        if self._options.watch in ("gradients", "all"):
            # the hooks count backward passes
            self._run.watch(model, log="gradients", log_freq=self._options.watch_every * self._accumulation)
        if self._options.watch in ("parameters", "all"):
            self._watched = model

    def log_model(self, folder: Path) -> None:
        if self._options.log_model:
            artifact = self._wandb.Artifact(f"model-{self._run.id}", type="model")
            artifact.add_dir(str(folder))
            self._run.log_artifact(artifact)

    def step(self, r: dict) -> None:
        if r["step"] % self._options.log_every == 0:
            self._run.log({"step": r["step"], **self._histograms(r["step"]), **_prefixed("train", r)})

    def eval(self, r: dict) -> None:
        values = _prefixed("eval", r)
        if r.get("samples"):
            rows = [[r["step"], s["prompt"], s["text"]] for s in r["samples"]]
            values["eval/samples"] = self._wandb.Table(columns=["step", "prompt", "text"], data=rows)
        self._run.log({"step": r["step"], **values})

    def event(self, r: dict) -> None:
        if r["event"] in ("stop", "interrupt", "warning"):
            self._run.alert(title=r["event"], text=r.get("message", ""))

    def summary(self, r: dict) -> None:
        self._run.summary.update({f"final/{k}": v for k, v in r.items() if k not in ("kind", "time")})

    def sync(self) -> None:
        pass  # W&B's own process writes as points arrive

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)

    def _histograms(self, step: int) -> dict:
        """Of all watched parameters, 64 bins each over their finite values, when they are due."""
        if self._watched is None or step < self._due:
            return {}
        self._due = step + self._options.watch_every
        found = {}
        for name, parameter in self._watched.named_parameters():
            values = parameter.detach().float().flatten()
            values = values[values.isfinite()]
            if len(values):
                low, high = values.min().item(), values.max().item()
                high = high if high > low else low + 1e-12 + abs(low) * 1e-6
                counts = values.histc(64, low, high).tolist()
                bins = np.linspace(low, high, 65).tolist()
                found[f"parameters/{name}"] = self._wandb.Histogram(np_histogram=(counts, bins))
        return found

    def _code(self, config: Config):
        """The library, the kernels, the program that was started and the resolved configuration as one artifact."""
        import ds_llm.kernels

        artifact = self._wandb.Artifact(f"code-{self._run.id}", type="code")
        package = Path(__file__).resolve().parents[1]
        kernels = Path(next(iter(ds_llm.kernels.__path__))).resolve()
        for root, prefix in ((package, "ds_llm"), (kernels, "kernels")):
            for path in sorted(root.rglob("*.py")):
                artifact.add_file(str(path), name=f"{prefix}/{path.relative_to(root).as_posix()}")
        program = Path(sys.argv[0])
        if program.is_file() and program.suffix == ".py":
            artifact.add_file(str(program), name=f"launch/{program.name}")
        with artifact.new_file("config.yaml", encoding="utf-8") as file:
            file.write(to_yaml(config))
        return artifact


def _prefixed(prefix: str, r: dict) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in _scalars(r).items()}


def _scalars(r: dict) -> dict[str, float]:
    """The numbers of a step or eval record, with the spread of the expert load as one number."""
    found = {
        name: float(value)
        for name, value in r.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in ("step", "time", "eta")
    }
    if r.get("skipped"):
        found["skipped"] = 1.0
    if r.get("expert_load"):
        # 1 when balanced, the number of experts when one gets all
        found["expert_imbalance"] = max(max(layer) * len(layer) / max(sum(layer), 1e-20) for layer in r["expert_load"])
    return found


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:,.2f}" if abs(value) < 1e6 and abs(value) >= 1 else f"{value:.4g}"
