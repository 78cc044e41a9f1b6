"""A process of the job that `ds_llm.verify.processes` starts: python -m ds_llm.verify.worker FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from ds_llm import cli


def main() -> None:
    from ds_llm.verify import sharded  # imports DeepSpeed, after `cli.quiet`

    sharded.main(Path(sys.argv[1]))


if __name__ == "__main__":
    cli.run(main)
