"""Prepare data for training: fetch, clean, train a tokenizer, tokenise; show what a recipe trains on.

  prepare.py fetch shakespeare --out data
  prepare.py clean data/train.jsonl --out data/clean.jsonl
  prepare.py tokenizer data/clean.jsonl --out data/tokenizer
  prepare.py tokens data/clean.jsonl --tokenizer data/tokenizer --out data/train.bin
  prepare.py show --config ds_configs/recipes/sft.yaml

Interrupted at any point, the same command continues; finished, it does nothing. See docs/data.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ds_llm.commands import parsing
from ds_llm.config import modes
from ds_llm.errors import UserError

INPUTS = "files, folders or quoted globs: .jsonl, .ndjson, .json, .txt, each also .gz or .zst, and .parquet"


def main() -> None:
    parser = parsing.new_parser(__doc__)
    add_commands(parser)
    arguments = parser.parse_args()
    try:
        arguments.command(arguments)
    except KeyboardInterrupt:
        raise UserError("interrupted; run the same command again to continue", exit_code=130) from None


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands to the parser; `arguments.command(arguments)` runs the chosen one."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    fetch = commands.add_parser("fetch", help="fetch a small public corpus or model by name")
    fetch.add_argument(
        "name",
        help="texts: shakespeare, boolq, xsum; chats and pairs: shakespeare_chat, boolq_chat, qa_pairs; tasks for "
        "lm-eval: mmlu, piqa, commonsense_qa, openbookqa, boolq_dev; a model: smollm2",
    )
    fetch.add_argument("--out", metavar="FOLDER", help="where to write (default: a folder of that name in the cache)")
    fetch.set_defaults(command=run_fetch)

    clean = _command(commands, run_clean, "clean", "keep valid rows, each text once, and name every dropped row")
    clean.add_argument("--out", required=True, metavar="FILE.jsonl", help="the cleaned rows")
    clean.add_argument("--min-chars", type=parsing.count, default=1, metavar="N", help="drop shorter texts (default 1)")
    clean.add_argument("--max-chars", type=parsing.count, metavar="N", help="drop longer texts (default: no limit)")
    _workers(clean)

    tokenizer = _command(commands, run_tokenizer, "tokenizer", "train a byte-level BPE tokenizer")
    tokenizer.add_argument("--out", required=True, metavar="FOLDER", help="the tokenizer, for AutoTokenizer")
    tokenizer.add_argument(
        "--vocab-size", type=parsing.count, default=6400, metavar="N", help="tokens at most (default 6400)"
    )

    tokens = _command(commands, run_tokens, "tokens", "tokenise to a token file for training")
    tokens.add_argument("--tokenizer", required=True, metavar="FOLDER", help="tokenizer folder or hub name")
    tokens.add_argument("--out", required=True, metavar="FILE.bin", help="the token file; its index is FILE.idx")
    tokens.add_argument(
        "--validation",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the documents that goes to FILE.val.bin, chosen by the text's hash (default 0)",
    )
    _workers(tokens)

    show = commands.add_parser(
        "show",
        help="show what a recipe trains on",
        description=f"Show samples of a recipe for {modes.names('shown')}, trained tokens in colour, and count them.",
    )
    show.add_argument("--config", metavar="YAML", help="the recipe that launch/train.py takes")
    show.add_argument("--samples", type=parsing.count, default=3, metavar="N", help="how many to show (default 3)")
    show.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.train_on=last")
    show.set_defaults(command=run_show)


def _command(commands, function, name: str, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=INPUTS)
    parser.add_argument("--field", default="text", help="field that holds the text (default text)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output made from other settings")
    parser.set_defaults(command=function)
    return parser


def _workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=parsing.count, metavar="N", help="processes (default: one per available CPU)")


def run_fetch(arguments: argparse.Namespace) -> None:
    from ds_llm.data.corpora import fetch_corpus

    for path in fetch_corpus(arguments.name, arguments.out).values():
        print(path)


def run_clean(arguments: argparse.Namespace) -> None:
    from ds_llm.data import statistics
    from ds_llm.data.clean import clean
    from ds_llm.data.resumable import beside

    out = Path(arguments.out)
    result = clean(
        arguments.inputs,
        out,
        field=arguments.field,
        min_chars=arguments.min_chars,
        max_chars=arguments.max_chars,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    statistics.show(str(out), result, beside(out, ".rejects.jsonl"))
    statistics.show_lengths(result["lengths"], "characters")


def run_tokenizer(arguments: argparse.Namespace) -> None:
    from ds_llm.data import statistics
    from ds_llm.data.resumable import beside
    from ds_llm.data.tokenizer import train_tokenizer
    from ds_llm.progress import console

    out = Path(arguments.out)
    result = train_tokenizer(
        arguments.inputs,
        out,
        vocab_size=arguments.vocab_size,
        field=arguments.field,
        overwrite=arguments.overwrite,
    )
    statistics.show(str(out), result, beside(out, ".rejects.jsonl"))
    size = result["vocab_size"]
    note = "" if size >= arguments.vocab_size else f" (the text holds no more than that of {arguments.vocab_size:,})"
    console.print(f"Vocabulary: {size:,} tokens{note}; {result['bytes_per_token']:.2f} bytes per token")


def run_tokens(arguments: argparse.Namespace) -> None:
    from ds_llm.data import statistics
    from ds_llm.data.encode import encode, validation_path
    from ds_llm.data.resumable import beside
    from ds_llm.progress import console

    out = Path(arguments.out)
    result = encode(
        arguments.inputs,
        out,
        arguments.tokenizer,
        field=arguments.field,
        validation=arguments.validation,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    statistics.show(str(out), result, beside(out, ".rejects.jsonl"))
    statistics.show_lengths(result["lengths"], "tokens")
    if arguments.validation:
        held_out = result["validation_lengths"]
        console.print(f"{validation_path(out)}: {held_out['count']:,} documents, {held_out['total']:,} tokens")


def run_show(arguments: argparse.Namespace) -> None:
    from ds_llm.commands.show import show_run
    from ds_llm.config import run as config

    show_run(config.load(arguments.config, arguments.overrides), arguments.samples)
