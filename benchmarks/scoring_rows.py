"""Does scoring millions of rows stay within bounded memory, and how fast are its stages?

Writes a synthetic data set and a tiny model, runs `launch/score.py` on both, and watches the memory of all its
processes: what is private to each (what it would give back to the machine) and its largest resident set, which counts
the pages of mapped files that are in the machine's cache anyhow.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.machine import record
from ds_llm import cli

WORDS = 2000
MIB = 2**20


def write_rows(path: Path, count: int, seed: int) -> None:
    """Rows of 2 to 14 words drawn from a small vocabulary, written in blocks."""
    rng = np.random.default_rng(seed)
    syllables = ["ka", "lo", "mi", "ner", "tus", "shi", "vo", "pra", "del", "um"]
    words = np.array(["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(WORDS)])
    with path.open("w", encoding="utf-8") as file:
        for begin in range(0, count, 100_000):
            lengths = rng.integers(2, 15, min(100_000, count - begin))
            drawn = np.split(words[rng.zipf(1.3, lengths.sum()) % WORDS], np.cumsum(lengths)[:-1])
            file.writelines(json.dumps({"text": " ".join(row)}) + "\n" for row in drawn)


def write_model(folder: Path, rows: Path) -> None:
    """A decoder of one layer whose work is next to nothing, with a tokenizer made of the first rows."""
    from itertools import islice

    from ds_llm.data.tokenizer import load_tokenizer, train_tokenizer
    from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM

    sample = folder.parent / "sample.jsonl"
    with rows.open(encoding="utf-8") as file:
        sample.write_text("".join(islice(file, 20_000)), encoding="utf-8")
    train_tokenizer(str(sample), folder, vocab_size=512)
    tokenizer = load_tokenizer(folder)
    config = DecoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=32,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    DecoderForCausalLM(config).save_pretrained(folder)


def watch(command: list[str], every: float) -> tuple[int, dict[str, int], float]:
    """Run a job to its end. Returns its exit status, the largest private and resident bytes of a process and of all
    together, and seconds."""
    began, peak = time.monotonic(), {"private": 0, "resident": 0, "private_all": 0}
    job = psutil.Popen(command)
    while job.poll() is None:
        private = []
        for process in [job, *job.children(recursive=True)]:
            try:
                memory = process.memory_full_info()
            except psutil.Error:  # it has ended
                continue
            private.append(memory.uss)
            peak["resident"] = max(peak["resident"], memory.rss)
        if private:
            peak["private"] = max(peak["private"], *private)
            peak["private_all"] = max(peak["private_all"], sum(private))
        time.sleep(every)
    return job.returncode, peak, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring_rows", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to write data and scores (default: a temporary one)")
    parser.add_argument("--json", metavar="PATH", help="also write the results here")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for count in arguments.rows:
            results.append(measure(folder, count, arguments.processes, arguments.seed))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"results": results, **record()}, indent=1) + "\n")


def measure(folder: Path, count: int, processes: int, seed: int) -> dict:
    rows, model, out = folder / f"{count}.jsonl", folder / "model", folder / f"{count}.scores.jsonl"
    write_rows(rows, count, seed)
    if not model.exists():
        write_model(model, rows)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = Path(__file__).parents[1] / "launch" / "score.py"
    arguments = ["--model", str(model), "--data", str(rows), "--metric", "entropy", "--out", str(out), "--only-idx"]
    status, peak, seconds = watch([*launcher, str(script), *arguments], every=2.0)
    if status:
        raise SystemExit(status)
    statistics = json.loads((folder / f"{out.name}.d" / "statistics.json").read_text())
    with out.open("rb") as file:
        written = sum(1 for _ in file)
    if not written == statistics["scored"] == count:
        raise RuntimeError(f"{count:,} rows in, {written:,} out, {statistics['scored']:,} with a score")
    stages = ", ".join(f"{name} {value:,.0f} s" for name, value in statistics["seconds"].items())
    print(
        f"{count:,} rows, {statistics['tokens']:,} tokens, {processes} processes: {seconds:,.0f} s ({stages}); most "
        f"memory of a process {peak['private'] / MIB:,.0f} MiB private, {peak['resident'] / MIB:,.0f} MiB resident; "
        f"of all together {peak['private_all'] / MIB:,.0f} MiB private",
        flush=True,
    )
    rows.unlink(), out.unlink()
    kept = ("rows", "tokens", "batches", "seconds", "rows_per_second", "tokens_per_second")
    return {**{name: statistics[name] for name in kept}, "wall_seconds": seconds, "peak_bytes": peak}


if __name__ == "__main__":
    cli.run(main)
