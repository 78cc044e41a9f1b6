#!/usr/bin/env python
"""Prove that a model works here as in plain torch; the command is `ds_llm.commands.verify`."""

from ds_llm import cli
from ds_llm.commands import verify

if __name__ == "__main__":
    cli.run(verify.main)
