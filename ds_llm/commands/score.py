"""Score every row of a data set by a causal language model: entropy, log-probability, perplexity, and more at once.

  score.py --model PATH --data a.jsonl --metric entropy --field entropy_0 --out scores.jsonl
  deepspeed score.py --model PATH --data 'data/*.jsonl' --metric entropy ifd --out scores.jsonl score.max_length=2048

Killed at any point, the same command continues, on any number of processes, to the same bytes. See docs/scoring.md.
"""

import re

from ds_llm.commands import environment, parsing
from ds_llm.distributed.environment import rank

OVERRIDE = re.compile(r"score\.\w+=")


def main() -> None:
    parser = parsing.new_parser(__doc__, launched=True)
    parser.add_argument("--config", metavar="YAML", help="file with a section score")
    parser.add_argument("--print-config", action="store_true", help="print all options and exit")
    parser.add_argument("--model", help="folder, hub name, run, checkpoint, adapter or .gguf file")
    parser.add_argument("--data", nargs="+", help="files, folders, patterns, or data sets of the hub")
    parser.add_argument("--metric", nargs="+", help="entropy (default), logprob, perplexity, ifd, ...")
    parser.add_argument("--field", nargs="+", help="their names in the output (default: the metrics')")
    parser.add_argument("--out", metavar="PATH", help="output, JSON lines; PATH.d beside it holds the rest")
    parser.add_argument("--only-idx", action="store_true", default=None, help="write idx and scores without the rows")
    parser.add_argument("--per-token", action="store_true", default=None, help="also write each token's values")
    parser.add_argument("--overwrite", action="store_true", default=None, help="replace what is there of other runs")
    parser.add_argument("overrides", nargs="*", metavar="score.key=value", help="such as score.tokens_per_batch=8192")
    arguments = vars(parser.parse_intermixed_args())

    environment.equal_bits()
    from ds_llm.config.options import to_yaml
    from ds_llm.scoring import options

    overrides = arguments.pop("overrides")
    for name in ("data", "metric", "field"):  # an override behind a list is none of its items
        values = arguments[name] or []
        overrides += [value for value in values if OVERRIDE.match(value)]
        arguments[name] = [value for value in values if not OVERRIDE.match(value)] or None
    path, shown, _ = arguments.pop("config"), arguments.pop("print_config"), arguments.pop("local_rank")
    given = {name: value for name, value in arguments.items() if value is not None}
    resolved = options.load(path, overrides, given)
    if shown:
        if rank() == 0:
            print(to_yaml(options.Options(resolved)), end="")
        return

    environment.deepspeed_on_cpu_without_gpu()
    from ds_llm.distributed.interrupt import Interrupt
    from ds_llm.scoring.run import score

    interrupt = Interrupt()
    score(resolved, stop=lambda: interrupt.reason if interrupt.requested() else None)
