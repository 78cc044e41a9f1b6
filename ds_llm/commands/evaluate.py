"""Evaluate a causal language model: a Hugging Face folder or hub name, the folder of a run or of a checkpoint.

  evaluate.py perplexity --model runs/pretrain --data data/val.bin
  deepspeed evaluate.py perplexity --model MODEL --data wiki.test.jsonl --window 2048 --json result.json
  evaluate.py generations --model MODEL --data chats.jsonl --metrics bleu rouge
  evaluate.py harness --model runs/select --against base=MODEL --tasks mmlu 'arc_*' my_task.yaml

Every number of processes gives the same result. See docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable

from ds_llm.commands import environment, parsing
from ds_llm.distributed.environment import rank
from ds_llm.errors import UserError


def main() -> None:
    environment.equal_bits()
    parser = parsing.new_parser(__doc__, launched=True)
    add_commands(parser)
    arguments = parser.parse_args()
    arguments.command(arguments)


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add each command to `parser`; `parse_args` then gives `command(arguments)`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add = _command(commands, "perplexity", "perplexity by the windowed protocol of the published figures", _perplexity)
    add("--data", required=True, nargs="+", help="texts (.txt, .jsonl, .parquet; folders) or token files")
    add("--window", type=int, help="tokens of a window (2048, or the model's positions where fewer)")
    add("--stride", type=int, help="tokens between the starts of windows (default: the window)")
    add("--field", default="text", help="field of a row that holds the text (text)")
    add("--batch-size", type=int, default=1, help="windows per forward pass and process (1)")
    add("--max-windows", type=int, default=0, help="use only so many windows from the front (0: all)")

    add = _command(commands, "generations", "BLEU, chrF and ROUGE of greedy answers against references", _generations)
    add("--data", required=True, nargs="+", help="chats, or rows with prompt and completion (.jsonl, .json, .parquet)")
    add("--metrics", nargs="+", default=["bleu", "chrf", "rouge"], help="bleu, chrf, rouge (all of them)")
    add("--words", default="13a", help="what BLEU and ROUGE count as words: 13a, intl, zh, char (13a)")
    add("--rows", type=int, default=0, help="use only so many rows from the front (0: all)")
    add("--max-new-tokens", type=int, default=64, help="tokens generated per prompt, at most (64)")
    add("--batch-size", type=int, default=8, help="prompts per forward pass and process (8)")
    add("--out", metavar="PATH", help="also write prompts, references and generations as JSON lines")

    harness = commands.add_parser("harness", help="benchmarks of lm-eval, beside other models")
    harness.set_defaults(command=_harness)
    add = harness.add_argument
    add("--model", required=True, help="folder, hub name, run or checkpoint")
    add("--tasks", required=True, nargs="+", help="names or patterns of lm-eval's tasks, task files (.yaml), folders")
    add("--against", nargs="+", default=[], type=_named, metavar="NAME=PATH", help="models to compare with")
    add(
        "--limit",
        type=parsing.count,
        metavar="N",
        help="use only so many rows of each task from the front (default: all)",
    )
    add("--shots", type=int, metavar="N", help="worked examples in each prompt (default: the task's own number)")
    add("--batch-size", type=parsing.count, default=8, help="prompts per forward pass and process (8)")
    parsing.add_dtype(harness)
    add("--chat-template", action="store_true", help="render the prompts as conversations")
    add("--json", metavar="PATH", help="also write the results and what they were measured on")


def _named(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path or name == "model":
        raise argparse.ArgumentTypeError(f"'{text}' must be NAME=PATH, the name not 'model'")
    return name, path


def _command(commands, name: str, help: str, run: Callable) -> Callable:
    """Add a command with the common options. Returns its `add_argument`."""
    parser = commands.add_parser(name, help=help)
    parser.set_defaults(command=run)
    add = parser.add_argument
    add("--model", required=True, help="folder, hub name, run or checkpoint")
    add("--tokenizer", help="tokenizer folder (default: the model's)")
    parsing.add_dtype(parser)
    add("--json", metavar="PATH", help="also write the result and what it was measured on")
    return add


def _perplexity(arguments: argparse.Namespace) -> None:
    from ds_llm.evaluation.measure import describe, measure

    result, about = measure(
        arguments.model,
        arguments.data,
        window=arguments.window,
        stride=arguments.stride,
        tokenizer_path=arguments.tokenizer,
        text_field=arguments.field,
        batch_size=arguments.batch_size,
        max_windows=arguments.max_windows,
        dtype=arguments.dtype,
    )
    report(describe(result), {**result.to_dict(), **about}, arguments.json)
    if not math.isfinite(result.nll):
        raise UserError(f"{arguments.model}: its loss on this text is not finite; try --dtype fp32")


def _generations(arguments: argparse.Namespace) -> None:
    from ds_llm.evaluation.generations import describe, measure_generations

    figures, about = measure_generations(
        arguments.model,
        arguments.data,
        arguments.metrics,
        word_tokenizer=arguments.words,
        tokenizer_path=arguments.tokenizer,
        rows=arguments.rows,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        out=arguments.out,
    )
    report(describe(figures, about), {**figures, **about}, arguments.json)


def _harness(arguments: argparse.Namespace) -> None:
    from ds_llm.evaluation.harness import describe, harness

    result = harness(
        arguments.model,
        arguments.tasks,
        against=dict(arguments.against),
        limit=arguments.limit,
        shots=arguments.shots,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        chat_template=arguments.chat_template,
    )
    report(describe(result), result, arguments.json)


def report(line: str, result: dict, path: str | None) -> None:
    """Print the line and, with a path, write the result as JSON; on rank 0."""
    from ds_llm.tracking.metrics_file import jsonable

    if rank() != 0:
        return
    print(line, flush=True)
    if path:
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump(jsonable(result), file, indent=2, ensure_ascii=False)
                file.write("\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
