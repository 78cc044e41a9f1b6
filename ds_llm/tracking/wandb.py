"""A run on Weights & Biases. Rank 0 only, but every rank calls `check_wandb`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np

from ds_llm.config.options import to_dict, to_yaml
from ds_llm.config.run import Config
from ds_llm.errors import UserError, first_line
from ds_llm.tracking.scalars import scalars


def check_wandb(config: Config) -> None:
    """Raise `UserError` where W&B cannot do what the configuration asks. Cheap; every rank calls it."""
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
    """A Weights & Biases run. Its id is saved in `<output>/wandb_id`, so that a continued run logs to the same W&B run.

    Points have the training step as their own axis, because W&B's internal step cannot go back to a checkpoint.
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
            raise UserError(
                f"Weights & Biases could not start ({first_line(error)}); "
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
        """Set up the histograms that the configuration asks for.

        W&B's hooks on parameters draw those of gradients. Those of parameters are drawn in `step`: W&B's hook for them
        needs a call of the model's forward, and the loss calls only the backbone.
        """
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
            self._run.log({"step": r["step"], **self._histograms(r["step"]), **scalars("train", r)})

    def eval(self, r: dict) -> None:
        values = scalars("eval", r)
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
        """Histograms of the finite values of all watched parameters, 64 bins each, in a step where they are due."""
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
        """An artifact of the library, the kernels, the started program and the resolved configuration."""
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
