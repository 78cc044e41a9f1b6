#!/usr/bin/env python
"""Evaluate a causal language model: a Hugging Face folder or hub name, the folder of a run or of a checkpoint.

  evaluate.py perplexity --model runs/pretrain --data data/val.bin
  deepspeed evaluate.py perplexity --model MODEL --data wiki.test.jsonl --window 2048 --json result.json
  evaluate.py generations --model MODEL --data chats.jsonl --metrics bleu rouge
  evaluate.py harness --model runs/select --against base=MODEL --tasks mmlu 'arc_*' my_task.yaml

Every number of processes gives the same result. See docs/evaluation.md.
"""

import argparse
import os

from ds_llm import cli


def main() -> None:
    # MKL's matrix products depend on the number of threads unless told otherwise; it reads this once, when it is loaded
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    from ds_llm.commands.evaluate import add_commands

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    add_commands(parser)
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    cli.run(main)
