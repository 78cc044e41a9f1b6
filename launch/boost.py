#!/usr/bin/env python
"""Boost a model in stages; the command is `ds_llm.commands.boost`."""

from ds_llm import cli
from ds_llm.commands import boost

if __name__ == "__main__":
    cli.run(boost.main)
