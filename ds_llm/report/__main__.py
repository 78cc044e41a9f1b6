"""`python -m ds_llm.report RUN` writes the report page of a run."""

from ds_llm import cli
from ds_llm.report.run import main

if __name__ == "__main__":
    cli.run(main)
