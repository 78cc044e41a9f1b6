#!/usr/bin/env python
"""Prepare data for training; the command is `ds_llm.commands.prepare`."""

from ds_llm import cli
from ds_llm.commands import prepare

if __name__ == "__main__":
    cli.run(prepare.main)
