"""Are fine-tuning and preference optimisation here at least as fast and as small as TRL's trainers?

Ours and TRL's `SFTTrainer` and `DPOTrainer` take the same steps: same model, same tokens in the same batches, same
optimizer, dtype and DeepSpeed configuration, packs for SFT and reference log-probabilities computed in advance for DPO
on both sides. Every contestant runs in a process of its own, forked from one that has imported the libraries both need,
and they take turns. The losses of both sides are compared step by step, and a first step that differs ends the
benchmark: then they would not do the same work.

Tokens are those that are no padding; their rate leaves the first step out. It is taken per second of the clock and per
second of CPU time, which depends less on what else a machine does. Memory is the process's largest resident set on a
CPU and the largest allocation on a GPU. All figures are medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from benchmarks import trainers_run
from ds_llm import cli
from ds_llm.errors import UserError

COMMON = ("torch", "deepspeed", "accelerate", "datasets", "transformers.models.llama.modeling_llama")
MODES = {"sft": "boolq_chat", "dpo": "qa_pairs"}
ROWS = 1500  # of the data set, more than a run of a few steps takes
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative difference of the first step's loss


@dataclass(frozen=True)
class Contestant:
    mode: str  # sft, dpo
    trainer: str  # ours, trl
    stage: int | None  # DeepSpeed ZeRO; None: without DeepSpeed

    @property
    def name(self) -> str:
        return f"{self.mode} {self.trainer:4} {'plain torch' if self.stage is None else f'ZeRO-{self.stage}'}"


def contestants(modes: list[str], stages: list[int]) -> list[Contestant]:
    """Ours beside TRL at every stage; beside ZeRO-0, where nothing is sharded, TRL without DeepSpeed."""
    return [
        contestant
        for mode in modes
        for stage in stages
        for contestant in (Contestant(mode, "ours", stage), Contestant(mode, "trl", stage or None))
    ]


def shorten(model: Path, layers: int, out: Path) -> Path:
    """The model with its first `layers` layers only, in `out`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = AutoModelForCausalLM.from_pretrained(model)
    found.model.layers = found.model.layers[:layers]
    found.config.num_hidden_layers = layers
    if getattr(found.config, "layer_types", None):
        found.config.layer_types = found.config.layer_types[:layers]
    found.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return out


def write_job(args, mode: str, model: Path, rows: list[str], out: Path) -> dict:
    """Write the batches of a run on these rows as both sides take them; returns what a contestant is told."""
    from ds_llm.config import run as config
    from ds_llm.config.deepspeed import build
    from ds_llm.data.order import SampleOrder
    from ds_llm.train.modes import dpo, sft

    data = out / f"{mode}.jsonl"
    data.write_text("".join(rows))
    overrides = [
        f"mode={mode}",
        f"model.path={model}",
        "model.attention=sdpa",
        f"data.train={data}",
        f"data.seq_len={args.seq_len}",
        f"train.batch_size={args.batch_size}",
        f"train.accumulation_steps={args.accumulation_steps}",
        f"train.max_steps={args.steps}",
        f"train.dtype={args.dtype}",
        "optim.lr=1e-5",
        "optim.schedule=constant",
        "optim.warmup_steps=0",
        "optim.weight_decay=0",
        "checkpoint.best=false",
        "checkpoint.last=false",
        "checkpoint.every_epoch=false",
        "tracking.log_every=1",
        "tracking.report=false",
        "tracking.tensorboard=false",
    ]
    settings = config.load(None, overrides)
    samples = {"sft": sft, "dpo": dpo}[mode].check(settings).train
    count = args.steps * args.batch_size * args.accumulation_steps
    order = SampleOrder(len(samples), settings.train.seed).take(0, count)
    rows = [{"sft": pack_row, "dpo": pair_row}[mode](samples, int(i)) for i in order]
    (out / f"{mode}.json").write_text(json.dumps(rows))
    each = args.batch_size * args.accumulation_steps
    tokens = [sum(row["tokens"] for row in rows[first : first + each]) for first in range(0, count, each)]
    stages = {}
    for stage in args.zero:
        settings.zero = stage
        stages[str(stage)] = build(settings, world_size=1)
    return {
        "overrides": overrides,
        "rows": str(out / f"{mode}.json"),
        "model": str(model),
        "seq_len": args.seq_len,
        "batch_size": args.batch_size,
        "accumulation_steps": args.accumulation_steps,
        "steps": args.steps,
        "dtype": args.dtype,
        "optim": asdict(settings.optim),
        "beta": settings.dpo.beta,
        "deepspeed": stages,
        "tokens": tokens,
    }


def pack_row(samples, index: int) -> dict:
    """A pack as TRL's collator takes it: labels stand at the token they name, not before it."""
    parts = [samples.documents.example(i) for i in samples.packs[index]]
    labels = [np.append(-100, targets[:-1]) for _, targets in parts]
    return {
        "input_ids": np.concatenate([ids for ids, _ in parts]).tolist(),
        "labels": np.concatenate(labels).tolist(),
        "seq_lengths": [len(ids) for ids, _ in parts],
        "tokens": sum(len(ids) for ids, _ in parts),
    }


def pair_row(samples, index: int) -> dict:
    """A pair as TRL's collator takes it. What follows the last trained token is left out, as no loss depends on it."""
    row, tokens = {}, 0
    for side, (ids, labels) in samples.pairs.pair(index)._asdict().items():
        trained = np.flatnonzero(labels != -100)
        row["prompt_ids"] = ids[: trained[0] + 1].tolist()
        row[f"{side}_ids"] = ids[trained[0] + 1 : trained[-1] + 2].tolist()
        tokens += len(ids) - 1
    return row | {"tokens": tokens}


def run(contestant: Contestant, job: dict, work: Path, context) -> dict:
    """Run one contestant in a process of its own; what it measured. Ends with its last words where it fails."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for scored in work.parent.glob("cache/*/reference-*"):  # by the run before: every run does its own pass
        shutil.rmtree(scored)
    (work / "job.json").write_text(json.dumps(job | asdict(contestant)))
    process = context.Process(target=trainers_run.main, args=(work,))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"error: {contestant.name}: {(work / 'output.txt').read_text().strip()[-3000:]}")
    found = json.loads((work / "result.json").read_text())
    tokens = sum(job["tokens"][1:])
    for name in ("clock", "cpu"):
        found[f"tokens_per_{name}_s"] = tokens / (found[name][-1] - found[name][0])
    return found


def check_losses(results: dict[Contestant, list[dict]], dtype: str) -> dict[str, float]:
    """Largest relative difference of each contestant's losses from our first run's; ends where first steps differ."""
    differences = {}
    for contestant, runs in results.items():
        expected = next(r for c, r in results.items() if c.mode == contestant.mode and c.trainer == "ours")[0]["losses"]
        errors = [abs(a / b - 1) for found in runs for a, b in zip(found["losses"], expected, strict=True)]
        first = abs(runs[0]["losses"][0] / expected[0] - 1)
        if first > TOLERANCE[dtype]:
            raise SystemExit(
                f"error: {contestant.name}: the first loss is {runs[0]['losses'][0]:.6f}, ours {expected[0]:.6f}: they "
                "do not train on the same batches"
            )
        differences[contestant.name] = max(errors)
    return differences


def table(results: dict[Contestant, list[dict]], differences: dict[str, float]) -> list[dict]:
    """Medians of every contestant, and of the ratio of ours at that stage to it."""
    rows = []
    for contestant, runs in results.items():
        partner = results.get(Contestant(contestant.mode, "ours", contestant.stage or 0), runs)
        # of each repeat's own figures, because both sides of a repeat meet the same load
        row = {"name": contestant.name, "loss_difference": differences[contestant.name]}
        for name in ("tokens_per_clock_s", "tokens_per_cpu_s", "peak_bytes", "reference_cpu_s"):
            if runs[0][name] is not None:
                ratios = [a[name] / b[name] for a, b in zip(partner, runs, strict=True)]
                row |= {
                    name: statistics.median(r[name] for r in runs),
                    f"ours_to_this_{name}": statistics.median(ratios),
                }
        rows.append(row)
    return rows


def own_rows(folder: Path, modes: list[str]) -> dict[str, list[str]]:
    """Lines of `sft.jsonl` (conversations) and `dpo.jsonl` (pairs) in a folder."""
    found = {}
    for mode in modes:
        try:
            found[mode] = (folder / f"{mode}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        except OSError as error:
            raise UserError(f"--rows: {error.filename}: {error.strerror}; {mode} takes its rows from there") from None
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainers", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a Llama-type chat model (default: SmolLM2-135M)")
    parser.add_argument(
        "--rows", type=Path, metavar="FOLDER", help="sft.jsonl, dpo.jsonl to train on (default: fetched)"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="keep the model's first N layers only")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--zero", nargs="+", type=int, choices=range(4), default=[0, 2], metavar="STAGE")
    parser.add_argument("--dtype", choices=TOLERANCE, default="fp32")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2, help="packs (sft) or pairs (dpo) of a micro-batch")
    parser.add_argument("--accumulation-steps", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would find out too, with a warning
    if args.steps < 2:
        parser.error("--steps: the first one is not measured, so at least 2 are needed")

    from benchmarks.machine import record, versions
    from ds_llm.data import corpora

    about = record()
    about["versions"] = versions(("torch", "transformers", "deepspeed", "accelerate", "trl"))
    chosen = contestants(args.mode, args.zero)
    if find_spec("trl") is None:
        print("TRL: not installed (pip install trl accelerate); only ours is measured")
        chosen = [c for c in chosen if c.trainer == "ours"]
    results: dict[Contestant, list[dict]] = {c: [] for c in chosen}
    # what a process imports may have touched the GPU, and such a process cannot be forked
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(list(COMMON))
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        model = args.model or corpora.smollm2()["smollm2"]
        if args.layers:
            model = shorten(model, args.layers, scratch / Path(model).name)
        if args.rows:
            rows = own_rows(args.rows, args.mode)
        else:
            rows = {m: getattr(corpora, MODES[m])(scratch / m)["train"].open().readlines() for m in args.mode}
        os.environ["DS_LLM_CACHE"] = str(scratch / "cache")
        jobs = {mode: write_job(args, mode, model, rows[mode][:ROWS], scratch) for mode in args.mode}
        for repeat in range(args.repeats):
            for contestant in chosen:
                found = run(contestant, jobs[contestant.mode], scratch / "work", context)
                results[contestant].append(found)
                print(
                    f"repeat {repeat + 1}/{args.repeats}  {contestant.name:20} "
                    f"{found['tokens_per_clock_s']:8.1f} tokens/s "
                    f"{found['tokens_per_cpu_s']:8.1f} tokens/CPU s {found['peak_bytes'] / 2**30:6.2f} GiB  "
                    f"losses {found['losses'][0]:.6f} to {found['losses'][-1]:.6f}",
                    flush=True,
                )
            if not repeat:
                check_losses(results, args.dtype)
    rows = table(results, check_losses(results, args.dtype))
    tokens = {mode: statistics.mean(job["tokens"]) for mode, job in jobs.items()}
    print(
        f"\n{model.name}{f', {args.layers} layers' if args.layers else ''}, {args.dtype}, {args.steps} steps of "
        + " or ".join(f"{count:,.0f} tokens ({mode})" for mode, count in tokens.items())
        + f", {about['machine']['cpu']}, {about['machine']['threads']} threads"
    )
    columns = {
        "tokens_per_clock_s": ("tokens/s", 1),
        "tokens_per_cpu_s": ("/CPU s", 1),
        "peak_bytes": ("peak GiB", 2**30),
        "reference_cpu_s": ("reference CPU s", 1),
    }
    print(f"{'':20}" + "".join(f"{title:>16}{'ours':>7}" for title, _ in columns.values()) + f"{'losses differ':>15}")
    for row in rows:
        line = f"{row['name']:20}"
        for name, (_, unit) in columns.items():
            known = name in row
            line += f"{row[name] / unit:16.2f}{row[f'ours_to_this_{name}']:6.2f}x" if known else f"{'':23}"
        print(line + f"{row['loss_difference']:15.1e}")
    if args.json:
        asked = {k: v for k, v in vars(args).items() if k not in ("json", "model", "rows")}
        runs = {c.name: found for c, found in results.items()}
        measured = {"model": model.name, "arguments": asked, "tokens_per_step": tokens, "table": rows, "runs": runs}
        args.json.write_text(json.dumps(about | measured, indent=2) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    cli.run(main)
