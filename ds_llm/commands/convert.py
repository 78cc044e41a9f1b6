"""Make models of other models, and compare them.

  convert.py boost --models runs/base runs/sft --out models/boosted --lambda 0.5
  convert.py extract --model runs/fused --index 1 --out models/strong
  convert.py select-moe --model runs/moe --out models/select
  convert.py compare --model models/select --original runs/moe

boost fuses models of one vocabulary into one that votes; extract takes one out again (docs/boosting.md). select-moe
gives a mixture of experts quality gates; compare prints how far the result is from the original (docs/select_moe.md).
"""

import argparse

from ds_llm.commands import environment, parsing


def boost(arguments: argparse.Namespace) -> None:
    from ds_llm.convert import boost as convert

    connection = None if arguments.connection == "none" else arguments.connection
    options = {"fusion_lambda": arguments.fusion_lambda, "connection": connection, "dtype": arguments.dtype}
    found = convert.boost(arguments.models, arguments.out, **options)
    print(f"fused against the vote of {len(arguments.models)} models, fp32: ", end="")
    report(found)


def extract(arguments: argparse.Namespace) -> None:
    from ds_llm.convert import boost as convert

    options = {"dtype": arguments.dtype, "drop_connection": arguments.drop_connection}
    found = convert.extract(arguments.model, arguments.index, arguments.out, **options)
    print(f"by itself against sub-model {arguments.index} in the boosted model, fp32: ", end="")
    report(found)


def select_moe(arguments: argparse.Namespace) -> None:
    from ds_llm.convert import select_moe as convert

    names = ("trash", "init_mean", "init_std", "seed")
    found = convert.select_moe(arguments.model, arguments.out, **{name: getattr(arguments, name) for name in names})
    print(f"{found.gates} gates ({found.gate_weights:,} weights) in {found.layers} layers; {found.files} weight files, "
          f"{found.bytes / 1e9:.3g} GB, taken over unchanged")  # fmt: skip
    print(f"wrote {found.folder}")


def compare(arguments: argparse.Namespace) -> None:
    from ds_llm.convert import select_moe as convert

    print(convert.compare(arguments.original, arguments.model, arguments.dtype))


def report(found) -> None:
    print(f"largest difference of the logits {found.made:.3g} (largest logit {found.largest:.3g})")
    print(f"read back from {found.dtype}: largest difference of the logits {found.rounding:.3g}")
    print(f"wrote {found.folder}")


def main() -> None:
    parser = parsing.new_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = commands.add_parser("boost", help="fuse models into one that votes")
    p.set_defaults(command=boost)
    p.add_argument("--models", required=True, nargs="+", help="folders, runs or hub names, the weakest first")
    p.add_argument("--lambda", dest="fusion_lambda", type=float, default=0.5, help="weight of the second of two (0.5)")
    p.add_argument("--connection", default="none", choices=("none", "linear", "gated"),
                   help="also feed each by its predecessor; begins without effect")  # fmt: skip

    p = commands.add_parser("extract", help="take a sub-model out of a boosted model")
    p.set_defaults(command=extract)
    p.add_argument("--model", required=True, help="boosted model: folder, run, checkpoint or adapter of one")
    p.add_argument("--index", type=int, default=-1, help="which, from 0; -1 is the last (-1)")
    p.add_argument("--drop-connection", action="store_true", help="also where it is fed by its predecessor: without it")

    for p in commands.choices.values():
        parsing.add_dtype(p, "of the written weights; auto: as in the file")

    p = commands.add_parser("select-moe", help="give a mixture of experts quality gates")
    p.set_defaults(command=select_moe)
    p.add_argument("--model", required=True, help="folder, run or hub name of a mixture-of-experts model")
    p.add_argument("--trash", default="zero", help="expert of what a gate holds back: zero, noise, a registered one")
    p.add_argument("--init-mean", type=float, default=0.0, help="mean of the gates' first weights (0)")
    p.add_argument("--init-std", type=float, default=0.02, help="standard deviation of the gates' first weights (0.02)")
    p.add_argument("--seed", type=int, default=0, help="of the gates' first weights (0)")
    for p in commands.choices.values():
        p.add_argument("--out", required=True, metavar="FOLDER", help="new or empty folder to write")

    p = commands.add_parser("compare", help="print how far a Select-MoE model is from the model it was made of")
    p.set_defaults(command=compare)
    p.add_argument("--model", required=True, help="the Select-MoE model")
    p.add_argument("--original", required=True, help="the model that it was made of")
    p.add_argument("--dtype", default="fp32", choices=parsing.DTYPES[1:], help="that both are loaded in (fp32)")

    arguments = parser.parse_args()
    environment.deepspeed_on_cpu()
    arguments.command(arguments)
