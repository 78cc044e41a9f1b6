"""Select rows to train on: score them and collect router features, cluster, pick from the clusters by quality.

  select_data.py --config ds_configs/recipes/select.yaml
  deepspeed select_data.py --config RECIPE.yaml score.model=MODEL 'score.data=[a.jsonl]' output=runs/selected

Killed at any point, the same command goes on; what is done and still holds is not done again. See docs/selection.md.
"""

from ds_llm.commands import environment, parsing
from ds_llm.distributed.environment import rank
from ds_llm.errors import UserError


def main() -> None:
    parser = parsing.new_parser(__doc__, launched=True)
    parser.add_argument("--config", metavar="YAML", help="recipe, such as ds_configs/recipes/select.yaml")
    parser.add_argument("--print-config", action="store_true", help="print all options and exit")
    parser.add_argument("--overwrite", action="store_true", help="replace scores of another model, data or options")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example select.percentage=0.1")
    arguments = parser.parse_intermixed_args()

    environment.equal_bits()
    from ds_llm.config.options import to_yaml
    from ds_llm.selection import options

    resolved = options.load(arguments.config, arguments.overrides)
    if arguments.print_config:
        if rank() == 0:
            print(to_yaml(resolved), end="")
        return

    environment.deepspeed_on_cpu_without_gpu()
    from ds_llm.distributed.interrupt import Interrupt
    from ds_llm.selection.run import select

    try:
        select(resolved, Interrupt(), arguments.overwrite)
    except KeyboardInterrupt:
        raise UserError("interrupted; run the same command again to continue", exit_code=130) from None
