#!/usr/bin/env python
"""Search over configuration keys; the command is `ds_llm.commands.sweep`."""

from ds_llm import cli
from ds_llm.commands import sweep

if __name__ == "__main__":
    cli.run(sweep.main)
