"""A process of the job that `ds_llm.verify.processes` starts: python -m ds_llm.verify.worker FOLDER."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from ds_llm import cli
from ds_llm.verify.processes import ROWS, SUBJECT


def main() -> None:
    folder = Path(sys.argv[1])
    subject = pickle.loads((folder / SUBJECT).read_bytes())
    from ds_llm.verify import sharded  # imports DeepSpeed, after `cli.quiet`

    sharded.main(subject, folder / ROWS)


if __name__ == "__main__":
    cli.run(main)
