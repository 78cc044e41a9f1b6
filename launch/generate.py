#!/usr/bin/env python
"""Generate text with a causal language model; the command is `ds_llm.commands.generate`."""

from ds_llm import cli
from ds_llm.commands import generate

if __name__ == "__main__":
    cli.run(generate.main)
