#!/usr/bin/env python
"""Train a model: `deepspeed launch/train.py --config RECIPE.yaml key=value ...` (also `torchrun` and plain `python`).

Exit codes: 0 done, 75 interrupted after saving (run the same command again to go on), 2 wrong configuration, 1 any
other error.
"""

import argparse
import os

from ds_llm import cli


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="YAML", help="recipe; see ds_configs/recipes/ and docs/configuration.md")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--resume", metavar="auto|never|FOLDER", help="the same as resume=...")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example model.dim=128 optim.lr=1e-3")
    arguments = parser.parse_intermixed_args()

    from ds_llm import config, options

    overrides = arguments.overrides + ([f"resume={arguments.resume}"] if arguments.resume else [])
    resolved = config.load(arguments.config, overrides)
    if arguments.print_config:
        if cli.rank() == 0:
            print(options.to_yaml(resolved), end="")
        return 0

    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # equal bits whatever the alignment of a tensor in memory

    from ds_llm import trainer

    return trainer.train(resolved)


if __name__ == "__main__":
    cli.run(main)
