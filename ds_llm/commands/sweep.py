"""Search over configuration keys: each trial is a run of launch/train.py with other values.

  sweep.py --config ds_configs/sweeps/sft.yaml --count 10 --gpus 0,1
  sweep.py --mode pretrain --count 20 --parallel 2 train.max_steps=200

The file has the format of W&B's sweeps. Killed or interrupted, the same command goes on. See docs/sweeps.md.
"""

from pathlib import Path

from ds_llm.commands import parsing

READY = Path(__file__).resolve().parents[2] / "ds_configs" / "sweeps"


def main() -> int:
    parser = parsing.new_parser(__doc__)
    parser.add_argument("--config", metavar="YAML", help="sweep file; by default ds_configs/sweeps/MODE.yaml")
    parser.add_argument("--mode", help="what the trials train: pretrain, sft, lora, dpo, sparse, ...")
    parser.add_argument("--count", type=int, help="trials in all, those of an earlier call included")
    parser.add_argument("--output", metavar="FOLDER", help="of the sweep; by default runs/sweeps/NAME of the file")
    places = parser.add_mutually_exclusive_group()
    places.add_argument("--gpus", metavar="0,1", help="a trial at a time on each of these; 0+1,2+3: on two each")
    places.add_argument("--parallel", type=int, metavar="N", help="trials at a time, all seeing the same devices")
    parser.add_argument("--wandb", action="store_true", help="let W&B choose the values (needs its server)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of launch/train.py, for every trial")
    arguments = parser.parse_intermixed_args()

    from ds_llm.errors import ConfigError
    from ds_llm.sweeps import file
    from ds_llm.sweeps import slots as devices

    if arguments.config is None and arguments.mode is None:
        raise ConfigError(f"--config: name a sweep file, or with --mode one of those in {READY}")
    if arguments.count is not None and arguments.count < 1:
        raise ConfigError(f"--count: {arguments.count} must be at least 1")
    path = arguments.config or str(READY / f"{arguments.mode}.yaml")
    sweep_file = file.read(path, arguments.mode, arguments.overrides)
    slots = devices.slots(arguments.gpus, arguments.parallel)
    output = Path(arguments.output or Path("runs") / "sweeps" / Path(path).stem)
    if arguments.wandb:
        from ds_llm.sweeps import agents

        return agents.run(sweep_file, output, arguments.count, slots)

    from ds_llm.sweeps.study import Sweep

    return Sweep(sweep_file, output, arguments.count, slots).run()
