"""Is `launch/prepare.py tokens` at least as fast as `datasets.map` with the same tokenizer and processes?

Both tokenise the same JSONL, taking turns: ours from the file to the token file; `datasets.map`, batched, from a data
set that is loaded already to Arrow on the disk, and besides with the loading. Figures are medians of the repeats; the
ratio is the median of each repeat's own, because both sides of a repeat meet the same load. CPU seconds are those of
all processes together.
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np


def clock() -> np.ndarray:
    """Seconds of the wall clock, and CPU seconds of this process and its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in usages)])


def ours(source: Path, tokenizer: Path, work: Path, processes: int) -> tuple[np.ndarray, int]:
    """(seconds, tokens) of a run from JSONL to a token file."""
    from ds_llm.data.encode import encode

    start = clock()
    result = encode([source], work / "tokens.bin", tokenizer, workers=processes)
    return clock() - start, result["lengths"]["total"]


def datasets_map(source: Path, tokenizer: Path, work: Path, processes: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(seconds of map, seconds with loading, tokens) of a run of `datasets.map` without its cache."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)

    def tokenise(rows):
        return {"input_ids": [[*ids, encode.eos_token_id] for ids in encode(rows["text"])["input_ids"]]}

    start = clock()
    rows = load_dataset("json", data_files=str(source), split="train", cache_dir=str(work))
    loaded = clock()
    done = rows.map(tokenise, batched=True, num_proc=processes, remove_columns=rows.column_names)
    end = clock()
    return end - loaded, end - start, sum(len(ids) for ids in done["input_ids"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("--input", type=Path, metavar="JSONL", help='rows with "text" (default: Shakespeare)')
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="(default: one of 6,400 tokens from the input)"
    )
    parser.add_argument("--copies", type=int, default=4, help="times the input is repeated (default 4)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # both sides: the processes are the parallelism

    import datasets

    from benchmarks.machine import record, versions
    from ds_llm.data.corpora import fetch_corpus
    from ds_llm.data.tokenizer import train_tokenizer

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        source = args.input or fetch_corpus("shakespeare", scratch / "corpus")["train"]
        tokenizer = args.tokenizer or scratch / "tokenizer"
        if not args.tokenizer:
            train_tokenizer([source], tokenizer)
        text = source.read_bytes()
        rows = scratch / "rows.jsonl"
        rows.write_bytes((text if text.endswith(b"\n") else text + b"\n") * args.copies)
        size = rows.stat().st_size / 1e6
        results = {"ours": [], "datasets.map": [], "datasets load + map": []}
        for _ in range(args.repeats):
            work = scratch / "work"
            work.mkdir()
            seconds, tokens = ours(rows, tokenizer, work, args.processes)
            results["ours"].append(seconds)
            mapping, whole, expected = datasets_map(rows, tokenizer, work, args.processes)
            results["datasets.map"].append(mapping)
            results["datasets load + map"].append(whole)
            if tokens != expected:
                raise SystemExit(f"error: {tokens:,} tokens here, {expected:,} from datasets.map")
            shutil.rmtree(work)
    about = record()
    about["versions"] = versions(("datasets", "tokenizers", "transformers", "pyarrow"))
    print(f"{size:.1f} MB of JSONL, {tokens:,} tokens, {args.processes} processes, {about['machine']['cpu']}")
    print(f"{'':22}{'seconds':>9}{'MB/s':>8}{'Mtokens/s':>11}{'ours is':>10}{'CPU s':>9}{'ours is':>10}")
    for name, runs in results.items():
        seconds, cpu = np.median(runs, axis=0)
        speed, thrift = np.median(np.array(runs) / results["ours"], axis=0)
        print(
            f"{name:22}{seconds:9.2f}{size / seconds:8.2f}{tokens / seconds / 1e6:11.3f}{speed:9.2f}x"
            f"{cpu:9.2f}{thrift:9.2f}x"
        )
    if args.json:
        runs = {name: np.transpose(values).tolist() for name, values in results.items()}
        measured = {
            "megabytes": size,
            "tokens": tokens,
            "processes": args.processes,
            "seconds": {name: wall for name, (wall, _) in runs.items()},
            "cpu_seconds": {name: cpu for name, (_, cpu) in runs.items()},
        }
        args.json.write_text(json.dumps(about | measured, indent=2) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
