#!/usr/bin/env python
"""The former name of `launch/select_data.py`: the same command."""

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

if __name__ == "__main__":
    from ds_llm import cli
    from ds_llm.commands import select_data

    cli.run(select_data.main)
