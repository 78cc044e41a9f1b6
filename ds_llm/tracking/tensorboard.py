"""A run as TensorBoard event files. Rank 0 only."""

from __future__ import annotations

import functools
import threading
from pathlib import Path

from ds_llm.config.options import to_yaml
from ds_llm.config.run import Config
from ds_llm.tracking.scalars import scalars


class TensorBoard:
    """Event files in `<output>/tensorboard`; steps after the one continued from are purged."""

    def __init__(self, config: Config, output: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        _let_writers_fail_quietly()
        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=start_step + 1 if start_step else 0)
        if not start_step:
            self._writer.add_text("config", f"```yaml\n{to_yaml(config)}```", 0)

    def step(self, r: dict) -> None:
        for name, value in scalars("train", r).items():
            self._writer.add_scalar(name, value, r["step"], r["time"])

    def eval(self, r: dict) -> None:
        for name, value in scalars("eval", r).items():
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
    """Print no traceback for an error in TensorBoard's thread: the next write raises that error."""
    from ds_llm.compat.tensorboard import _AsyncWriterThread

    before = threading.excepthook

    def hook(arguments) -> None:
        if not isinstance(arguments.thread, _AsyncWriterThread):
            before(arguments)

    threading.excepthook = hook
