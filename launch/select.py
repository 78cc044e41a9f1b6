#!/usr/bin/env python
"""Select rows to train on: score them and collect router features, cluster, pick from the clusters by quality.

  select.py --config ds_configs/recipes/select.yaml
  deepspeed select.py --config ds_configs/recipes/select.yaml score.model=MODEL 'score.data=[a.jsonl]' output=runs/s

Killed at any point, the same command goes on; what is done and still holds is not done again. See docs/selection.md.
"""

import os
import sys

if __name__ == "select":
    # a script's own folder is searched first, so for every script beside this one `import select` finds this file where
    # the standard library's module of that name is wanted: give that
    from importlib.machinery import BuiltinImporter, PathFinder
    from importlib.util import module_from_spec

    here = os.path.dirname(os.path.abspath(__file__))
    places = [path for path in sys.path if os.path.abspath(path) != here]
    spec = BuiltinImporter.find_spec("select") or PathFinder.find_spec("select", places)
    sys.modules["select"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["select"])


def main() -> None:
    import argparse

    from ds_llm.distributed.environment import rank
    from ds_llm.errors import UserError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("--config", metavar="YAML", help="recipe, such as ds_configs/recipes/select.yaml")
    parser.add_argument("--print-config", action="store_true", help="print all options and exit")
    parser.add_argument("--overwrite", action="store_true", help="replace scores of another model, data or options")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example select.percentage=0.1")
    arguments = parser.parse_intermixed_args()

    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # equal bits for any number of threads
    from ds_llm.config.options import to_yaml
    from ds_llm.selection import options

    resolved = options.load(arguments.config, arguments.overrides)
    if arguments.print_config:
        if rank() == 0:
            print(to_yaml(resolved), end="")
        return

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which peft imports, warns of a missing GPU
    from ds_llm.distributed.interrupt import Interrupt
    from ds_llm.selection.run import select

    try:
        select(resolved, Interrupt(), arguments.overwrite)
    except KeyboardInterrupt:
        raise UserError("interrupted; run the same command again to continue", exit_code=130) from None


if __name__ == "__main__":
    from ds_llm import cli

    cli.run(main)
