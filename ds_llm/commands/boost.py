"""Boost a model: entropies, fine-tuning, resampling, a fused training with the base, and the strong model taken out.

  boost.py --config ds_configs/recipes/boost.yaml base=MODEL 'train=[train.jsonl]' 'val=[val.jsonl]'
  boost.py --config ds_configs/recipes/boost.yaml resample.seed=1 --redo resample

Started as one process; it starts the others itself (launcher=...). Interrupted at any point, the same command goes on;
finished stages are not repeated. See docs/boosting.md.
"""

from pathlib import Path

from ds_llm.commands import parsing

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def main() -> None:
    parser = parsing.new_parser(__doc__)
    parser.add_argument("--config", metavar="YAML", help="recipe, such as ds_configs/recipes/boost.yaml")
    parser.add_argument("--print-config", action="store_true", help="print all options and exit")
    parser.add_argument("--redo", metavar="STAGE", help="first remove what this stage and those behind it left")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example base=MODEL sft=[optim.lr=1e-5]")
    arguments = parser.parse_intermixed_args()

    from ds_llm.boosting import recipe as boosting
    from ds_llm.config import options

    resolved = options.load(boosting.BoostingConfig, arguments.config, arguments.overrides)
    if arguments.print_config:
        print(options.to_yaml(resolved), end="")
        return
    recipe = boosting.Recipe(resolved, LAUNCH)
    if arguments.redo:
        recipe.redo(arguments.redo)
    if recipe.run() is not None:
        print(f"report: {Path(resolved.output) / 'report.json'}")
