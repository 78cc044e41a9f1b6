"""Train a model: `deepspeed launch/train.py --config RECIPE.yaml key=value ...` (also `torchrun` and plain `python`).

Exit codes: 0 done, 75 interrupted after saving (run the same command again to go on), 2 wrong configuration, 1 any
other error.
"""

from ds_llm.commands import environment, parsing
from ds_llm.distributed.environment import rank, world_size


def main() -> int:
    parser = parsing.new_parser(__doc__, launched=True)
    parser.add_argument("--config", metavar="YAML", help="recipe; see ds_configs/recipes/ and docs/configuration.md")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument(
        "--plan", action="store_true", help="print the memory the run will need and exit, see docs/memory.md"
    )
    parser.add_argument("--world", type=int, metavar="N", help="with --plan: processes; by default those of this job")
    parser.add_argument("--card", metavar="24GB", help="with --plan: say what fits cards of this size")
    parser.add_argument("--resume", metavar="auto|never|FOLDER", help="the same as resume=...")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example model.dim=128 optim.lr=1e-3")
    arguments = parser.parse_intermixed_args()

    from ds_llm.config import options
    from ds_llm.config import run as config
    from ds_llm.errors import ConfigError

    overrides = arguments.overrides + ([f"resume={arguments.resume}"] if arguments.resume else [])
    resolved = config.load(arguments.config, overrides)
    if arguments.print_config:
        if rank() == 0:
            print(options.to_yaml(resolved), end="")
        return 0
    if arguments.plan:
        if rank() == 0:
            from ds_llm.memory import plan

            plan.show(resolved, world_size() if arguments.world is None else arguments.world, arguments.card)
        return 0
    if arguments.world is not None or arguments.card is not None:
        raise ConfigError("--world and --card belong to --plan")

    environment.equal_bits()
    from ds_llm.distributed import watchdog
    from ds_llm.train import trainer

    limits = resolved.stability
    with watchdog.guard(limits.hang_timeout, limits.lost_timeout, "stability"):
        return trainer.train(resolved)
