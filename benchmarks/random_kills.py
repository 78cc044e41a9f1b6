"""Kill training, preparing and scoring at random moments, continue, and compare with what nothing disturbed.

python -m benchmarks.random_kills --kills 200 --json kills.json
python -m benchmarks.random_kills --kills 20 --works train score --seed 7

Each output is made by one process after the other: each begins where the one before was killed by SIGKILL, at a random
moment of a run's length, until one ends by itself. Then all files that hold results must hold the same as those of a
run that was never killed: bytes, or for DeepSpeed's files the tensors and numbers in them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "MKL_CBWR": "AUTO,STRICT"}
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

from benchmarks import machine
from benchmarks.run_results import trained
from ds_llm import cli
from ds_llm.config import run as config
from ds_llm.data.clean import clean
from ds_llm.data.encode import encode
from ds_llm.data.tokenizer import train_tokenizer
from ds_llm.errors import UserError
from ds_llm.scoring import options, run
from ds_llm.train import trainer

WORDS = ["red", "blue", "green", "cat", "dog", "sun", "moon", "tree", "house", "river", "stone", "bird", "wind", "rain"]
STEPS = 24
PATIENCE = 25  # kills of one output until it may end undisturbed


@dataclass
class Work:
    """Something that is killed. do: makes the output in a folder, or continues it; results: what a whole one holds, by
    name; phase: what it is busy with, seen from outside, when it began at a time."""

    name: str
    do: Callable[[Path], object]
    results: Callable[[Path], dict]
    phase: Callable[[Path, float], str]


def forked(function: Callable[[], object], log: Path) -> int:
    """Start `function` in a process of its own, whose output goes to `log`; returns its number."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        function()
        code = 0
    except UserError as error:
        print(f"error: {error}")
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    finally:
        sys.stdout.flush()
        os._exit(code)


def whole(function: Callable[[], object], log: Path) -> float:
    """Run `function` in a process to its end; returns the seconds."""
    began = time.monotonic()
    if os.waitpid(forked(function, log), 0)[1]:
        sys.exit(f"error: ended by an error without being killed:\n{log.read_text()[-3000:]}")
    return time.monotonic() - began


def make_inputs(folder: Path, rng: random.Random) -> None:
    """Texts, a tokenizer, token files and a tiny model, all random."""
    folder.mkdir()
    for name, count in (("texts", 400), ("rows", 160)):
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(count)]
        rows = [json.dumps({"text": text}) for text in texts + rng.choices(texts, k=20)] + [
            "broken",
            '{"other": 1}',
        ] * 3
        rng.shuffle(rows)
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    train_tokenizer([folder / "texts.jsonl"], folder / "tokenizer", vocab_size=280)
    encode([folder / "texts.jsonl"], folder / "train.bin", folder / "tokenizer", workers=1, validation=0.1)
    from transformers import LlamaConfig, LlamaForCausalLM

    from ds_llm.pretrained.loading import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer")
    torch.manual_seed(rng.randrange(2**32))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def works(inputs: Path) -> dict[str, Work]:
    small = {"workers": 1, "batch_bytes": 400, "save_seconds": 0.0}
    keys = [
        f"data.train={inputs / 'train.bin'}",
        f"data.val={inputs / 'train.val.bin'}",
        *("model.dim=32", "model.n_layers=2", "model.n_heads=4", "model.max_seq_len=32", "model.dropout=0.1"),
        *("model.use_moe=true", "model.n_routed_experts=4", "train.batch_size=2", "train.dtype=bf16", "optim.lr=1e-3"),
        *(f"train.max_steps={STEPS}", "checkpoint.every_steps=1", "checkpoint.keep=2", "ema.enabled=true", "zero=2"),
        *("eval.every_steps=8", "eval.max_windows=4", "tracking.report=false", "tracking.tensorboard=false"),
    ]
    flags = {"model": str(inputs / "model"), "data": [str(inputs / "rows.jsonl")], "metric": ["entropy", "ifd"]}
    flags |= {"tokens_per_batch": 64, "report": False}
    texts = [inputs / "texts.jsonl"]
    found = [
        Work(
            "train",
            lambda out: trainer.train(config.load(None, [*keys, f"output={out}"])),
            lambda out: trained(out, STEPS),
            train_phase,
        ),
        Work("clean", lambda out: clean(texts, out / "out.jsonl", **small), files, prepare_phase),
        Work(
            "tokens",
            lambda out: encode(texts, out / "out.bin", inputs / "tokenizer", validation=0.2, **small),
            files,
            prepare_phase,
        ),
        Work("score", lambda out: run.score(options.load(flags={**flags, "out": str(out / "s")})), scored, score_phase),
    ]
    return {work.name: work for work in found}


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and not p.name.endswith(".lock")}


def scored(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("s", "s.d/rows.parquet")}


def train_phase(out: Path, began: float) -> str:
    saving = any(p.stat().st_mtime >= began for p in out.glob("checkpoints/.step-*.partial"))
    if saving:
        return "saving"
    return "training" if (out / "metrics.jsonl").exists() else "starting"


def prepare_phase(out: Path, began: float) -> str:
    return "preparing" if any(out.glob("*.partial*")) else "starting"


def score_phase(out: Path, began: float) -> str:
    if (out / "s.d" / "merge").exists():
        return "merging"
    if any(path.stat().st_mtime >= began for path in out.glob("s.d/parts/*")):
        return "scoring"
    return "starting"


def disturb(work: Work, out: Path, seconds: float, most: int, rng: random.Random, log: Path) -> Counter:
    """Make one output with up to `most` kills in between; returns what they hit. `seconds` is a whole run's length."""
    hit: Counter = Counter()
    out.mkdir()
    while sum(hit.values()) < min(most, PATIENCE):
        began, pid = time.time(), forked(lambda: work.do(out), log)
        end = time.monotonic() + rng.uniform(0, seconds)
        done, status = 0, 0
        while not done and time.monotonic() < end:
            time.sleep(min(0.005, max(0.0, end - time.monotonic())))
            done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                sys.exit(f"error: {work.name} does not continue:\n{log.read_text()[-3000:]}")
            return hit
        os.kill(pid, signal.SIGKILL)
        if os.waitpid(pid, 0)[1] != signal.SIGKILL:
            return hit  # it ended while it was aimed at
        hit[work.phase(out, began)] += 1
    whole(lambda: work.do(out), log)
    return hit


def check(work: Work, expected: Path, found: Path) -> None:
    """`SystemExit` unless two outputs hold the same."""
    one, other = work.results(expected), work.results(found)
    differ = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    if differ:
        raise SystemExit(f"{work.name}: differs from the undisturbed run in {', '.join(differ[:5])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="in all (default 200)")
    parser.add_argument("--works", nargs="+", default=["train", "clean", "tokens", "score"], metavar="WORK")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32), metavar="N")
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    arguments = parser.parse_args()
    cli.quiet()
    rng = random.Random(arguments.seed)
    print(f"seed {arguments.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="random-kills-"))
    log = folder / "log"
    whole(lambda: make_inputs(folder / "inputs", rng), log)
    chosen = [works(folder / "inputs")[name] for name in arguments.works]
    rows, total = [], 0
    for number, work in enumerate(chosen):
        expected, wanted = folder / work.name, (arguments.kills - total) // (len(chosen) - number)
        expected.mkdir()
        seconds = whole(lambda: work.do(expected), log)  # noqa: B023 (ends before the next one begins)
        hit, outputs = Counter(), 0
        while sum(hit.values()) < wanted:
            out = folder / f"{work.name}-killed"
            hit += disturb(work, out, seconds, wanted - sum(hit.values()), rng, log)
            whole(lambda: check(work, expected, out), log)  # noqa: B023
            outputs += 1
            shutil.rmtree(out)
        total += sum(hit.values())
        rows.append({"work": work.name, "kills": sum(hit.values()), "while": dict(hit), "outputs": outputs})
        where = ", ".join(f"{phase} {count}" for phase, count in hit.most_common())
        print(f"{work.name}: {sum(hit.values())} kills ({where}), {outputs} outputs, all equal", flush=True)
    print(f"{total} kills, nothing lost, every result equal to that of an undisturbed run")
    if arguments.json:
        found = {**machine.record(), "seed": arguments.seed, "kills": total, "works": rows}
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
