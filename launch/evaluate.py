#!/usr/bin/env python
"""Evaluate a causal language model; the command is `ds_llm.commands.evaluate`."""

from ds_llm import cli
from ds_llm.commands import evaluate

if __name__ == "__main__":
    cli.run(evaluate.main)
