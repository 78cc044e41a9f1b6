#!/usr/bin/env python
"""Train a model; the command is `ds_llm.commands.train`."""

from ds_llm import cli
from ds_llm.commands import train

if __name__ == "__main__":
    cli.run(train.main)
