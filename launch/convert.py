#!/usr/bin/env python
"""Make models of other models, and compare them; the command is `ds_llm.commands.convert`."""

from ds_llm import cli
from ds_llm.commands import convert

if __name__ == "__main__":
    cli.run(convert.main)
