#!/usr/bin/env python
"""Write a model as a Hugging Face folder, adapters merged; the command is `ds_llm.commands.export`."""

from ds_llm import cli
from ds_llm.commands import export

if __name__ == "__main__":
    cli.run(export.main)
