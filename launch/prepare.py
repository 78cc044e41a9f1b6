#!/usr/bin/env python
"""Prepare data for training: fetch, clean, train a tokenizer, tokenise; show what a recipe trains on.

  prepare.py fetch shakespeare --out data
  prepare.py clean data/train.jsonl --out data/clean.jsonl
  prepare.py tokenizer data/clean.jsonl --out data/tokenizer
  prepare.py tokens data/clean.jsonl --tokenizer data/tokenizer --out data/train.bin
  prepare.py show --config ds_configs/recipes/sft.yaml

Interrupted at any point, the same command continues; finished, it does nothing. See docs/data.md.
"""

import argparse

from ds_llm import cli
from ds_llm.errors import UserError


def main() -> None:
    from ds_llm.commands.prepare import add_commands

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_commands(parser)
    arguments = parser.parse_args()
    try:
        arguments.command(arguments)
    except KeyboardInterrupt:
        raise UserError("interrupted; run the same command again to continue", exit_code=130) from None


if __name__ == "__main__":
    cli.run(main)
