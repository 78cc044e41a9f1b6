"""Prove that a model trains, scores and generates here as plain torch and transformers do: one row for each proof.

  verify.py MODEL
  verify.py --config ds_configs/recipes/sft.yaml model.path=MODEL

MODEL is a folder, hub name, run or checkpoint; its weights are not read. A small model of the same configuration with
random weights is tried on the CPU, in one or two minutes. Of a run's configuration the model, the attention kernel, the
tokenizer and data.train_on count.

Exit codes: 0 all proofs hold or are refused, 1 one is broken, 2 a wrong name or configuration. See docs/models.md.
"""

from __future__ import annotations

import json
from pathlib import Path

from ds_llm.commands import environment, parsing
from ds_llm.errors import UserError


def main() -> int:
    parser = parsing.new_parser(__doc__)
    parser.add_argument("model", nargs="*", metavar="MODEL", help="folder, hub name, run or checkpoint")
    parser.add_argument("--config", metavar="YAML", help="a run's recipe, with key=value in place of MODEL")
    parser.add_argument("--json", metavar="PATH", help="also write the rows")
    arguments = parser.parse_intermixed_args()
    if arguments.config is None and len(arguments.model) != 1:
        parser.error("name one model, or a run's configuration with --config")
    environment.equal_bits()
    environment.deepspeed_on_cpu()
    try:
        return verify(arguments.config, arguments.model, arguments.json)
    except UserError as error:
        error.exit_code = 2
        raise


def verify(recipe: str | None, names: list[str], path: str | None) -> int:
    """Print the table; returns the exit code."""
    from ds_llm.commands.show import show_sample
    from ds_llm.config import run as config
    from ds_llm.progress import console
    from ds_llm.verify import report, subject, table

    given = subject.of_run(config.load(recipe, names)) if recipe else subject.of_model(names[0])
    if path is not None and not Path(path).resolve().parent.is_dir():
        raise UserError(f"{path}: there is no folder {Path(path).resolve().parent} to write it in")
    console.print(f"{given.name}: a small '{given.config.model_type}' model with random weights, on the CPU in fp32")
    rows = []
    for row in table.rows(given):
        report.show(row)
        rows.append(row)
        if row.shown is not None:
            show_sample(*row.shown)
    console.print(report.summary(rows))
    if path is not None:
        try:
            Path(path).write_text(json.dumps(table.as_json(given, rows), indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return int(any(row.status == report.BROKEN for row in rows))
