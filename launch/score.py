#!/usr/bin/env python
"""Score every row of a data set by a causal language model; the command is `ds_llm.commands.score`."""

from ds_llm import cli
from ds_llm.commands import score

if __name__ == "__main__":
    cli.run(score.main)
