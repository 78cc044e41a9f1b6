#!/usr/bin/env python
"""Select rows to train on; the command is `ds_llm.commands.select_data`."""

from ds_llm import cli
from ds_llm.commands import select_data

if __name__ == "__main__":
    cli.run(select_data.main)
