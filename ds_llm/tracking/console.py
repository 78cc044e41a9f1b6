"""A run on the console: a bar with live figures on a terminal, lines elsewhere. Rank 0 only."""

from __future__ import annotations

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ds_llm.config.modes import console_figures
from ds_llm.config.text_metrics import LABELS
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
            console.print("  ".join(head + figures(r) + left))

    def eval(self, r: dict) -> None:
        goal = r.get("goal", "perplexity")
        parts = [
            f"evaluation  step {r['step']}",
            f"epoch {r.get('epoch', 0):.2f}",
            f"{goal} {_number(r[goal])}",
        ]
        if r.get("accuracy") is not None:
            parts.append(f"accuracy {r['accuracy']:.1%}")
        parts += [f"{name.removeprefix('loss/')} {_number(v)}" for name, v in r.items() if name.startswith("loss/")]
        parts += [f"{label} {r[name]:.2f}" for name, label in LABELS.items() if r.get(name) is not None]
        if r["step"] == 0:
            parts.append("the baseline")
        elif r.get(f"baseline_{goal}") is not None and r.get("trend_percent") is not None:
            parts.append(f"{r['trend_percent']:+.1f} % against the baseline {_number(r[f'baseline_{goal}'])}")
        if r["step"] and r.get(f"best_{goal}") is not None:
            best = r[goal] is not None and r[goal] <= r[f"best_{goal}"]
            parts.append("best so far" if best else f"best {_number(r[f'best_{goal}'])}")
        console.print("  ".join(parts), style="bold")
        for sample in r.get("samples") or []:
            text = " ".join(sample["text"].split()) or "(no text)"
            text = text if len(text) <= SHOWN_SAMPLE else text[:SHOWN_SAMPLE] + " …"
            console.print(f"  {sample['prompt']!r} → {text}")

    def event(self, r: dict) -> None:
        if r.get("message"):
            console.print(f"{r['event']}: {r['message']}")

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
        *((name, label, f"{{:{form}}}".format) for name, label, form in console_figures()),
        ("aux_loss", "aux", lambda v: f"{v:.4f}"),
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


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:,.2f}" if abs(value) < 1e6 and abs(value) >= 1 else f"{value:.4g}"
