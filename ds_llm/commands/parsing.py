"""Arguments that several commands take."""

from __future__ import annotations

import argparse

DTYPES = ("auto", "fp32", "bf16", "fp16")
AS_SAVED = "auto: as saved on a GPU, fp32 on a CPU"


def new_parser(description: str, launched: bool = False) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring as it is written; launched: the deepspeed launcher may start it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if launched:
        parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher passes it
    return parser


def count(text: str) -> int:
    """The type of an argument that is a whole number of at least 1; underscores may group its digits."""
    digits = text.replace("_", "")
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(digits)


def add_dtype(parser: argparse.ArgumentParser, help: str = AS_SAVED) -> None:
    """Add `--dtype`, of the weights that a command loads or writes."""
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help=help)
