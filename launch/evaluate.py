#!/usr/bin/env python
"""Evaluate a causal language model: a Hugging Face folder or hub name, the folder of a run or of a checkpoint.

  evaluate.py perplexity --model runs/pretrain --data data/val.bin
  deepspeed evaluate.py perplexity --model MODEL --data wiki.test.jsonl --window 2048 --json result.json

Every number of processes gives the same result. See docs/evaluation.md.
"""

import argparse
import json
import math
import os

from ds_llm import cli
from ds_llm.errors import UserError


def perplexity(arguments: argparse.Namespace) -> None:
    # MKL's matrix products depend on the number of threads unless told otherwise; it reads this once, when it is loaded
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    from ds_llm.evaluation.measure import describe, measure
    from ds_llm.metrics import jsonable

    result, about = measure(
        arguments.model,
        arguments.data,
        window=arguments.window,
        stride=arguments.stride,
        tokenizer_path=arguments.tokenizer,
        text_field=arguments.field,
        batch_size=arguments.batch_size,
        max_windows=arguments.max_windows,
        dtype=arguments.dtype,
    )
    if cli.rank() == 0:
        print(describe(result), flush=True)
        if arguments.json:
            try:
                with open(arguments.json, "w", encoding="utf-8") as file:
                    json.dump(jsonable({**result.to_dict(), **about}), file, indent=2, ensure_ascii=False)
                    file.write("\n")
            except OSError as error:
                raise UserError(f"{arguments.json}: cannot be written ({error.strerror})") from None
    if not math.isfinite(result.nll):
        raise UserError(f"{arguments.model}: its loss on this text is not finite; try --dtype fp32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    p = commands.add_parser("perplexity", help="perplexity by the windowed protocol of the published figures")
    p.set_defaults(command=perplexity)
    p.add_argument("--model", required=True, help="folder, hub name, run or checkpoint")
    p.add_argument("--data", required=True, nargs="+", help="texts (.txt, .jsonl, .parquet; folders) or token files")
    p.add_argument("--window", type=int, help="tokens of a window (2048, or the model's positions where fewer)")
    p.add_argument("--stride", type=int, help="tokens between the starts of windows (default: the window)")
    p.add_argument("--tokenizer", help="tokenizer folder (default: the model's)")
    p.add_argument("--field", default="text", help="field of a row that holds the text (text)")
    p.add_argument("--batch-size", type=int, default=1, help="windows per forward pass and process (1)")
    p.add_argument("--max-windows", type=int, default=0, help="use only so many windows from the front (0: all)")
    p.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"),
                   help="auto: as saved on a GPU, fp32 on a CPU")  # fmt: skip
    p.add_argument("--json", metavar="PATH", help="also write the result and what it was measured on")
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    cli.run(main)
