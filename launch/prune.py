#!/usr/bin/env python
"""Prune a causal language model; the command is `ds_llm.commands.prune`."""

from ds_llm import cli
from ds_llm.commands import prune

if __name__ == "__main__":
    cli.run(prune.main)
