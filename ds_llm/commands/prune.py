"""Prune a causal language model and write it as a Hugging Face folder with exact zeros, masks and a report.

  prune.py --model MODEL --out pruned/ --method sparsegpt --density 0.5 --data calibration.jsonl
  prune.py --model MODEL --out pruned/ --method wanda --pattern 2:4 --data texts/
  prune.py --model MODEL --out pruned/ --method magnitude --density 0.2
  prune.py --model MODEL --out pruned/ --method mask --masks OTHER

The density is the share of weights that stay. See docs/pruning.md.
"""

from ds_llm.commands import environment, parsing
from ds_llm.errors import UserError


def main() -> None:
    parser = parsing.new_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder, hub name, run, checkpoint, adapter or .gguf file")
    add("--out", required=True, metavar="FOLDER", help="new or empty folder to write")
    add("--method", required=True, choices=("magnitude", "wanda", "sparsegpt", "mask"), help="mask: that of --masks")
    add("--density", type=float, help="share of the weights that stays, 0.05 to 0.9")
    add("--pattern", metavar="N:M", help="instead: keep N of every M inputs of a row, for example 2:4 or 4:8")
    add("--scope", choices=("layer", "row"), help="compare weights within it (magnitude, sparsegpt: layer; wanda: row)")
    add("--data", nargs="+", default=(), help="calibration text (.txt, .jsonl, .parquet; folders) or token files")
    add("--field", help="field of a row that holds the text (text)")
    add("--sequences", type=int, metavar="N", help="calibration sequences, drawn at random (128)")
    add("--length", type=int, metavar="TOKENS", help="tokens of each (2048, or the model's positions where fewer)")
    add("--seed", type=int, help="which sequences are drawn (0)")
    add("--damping", type=float, help="sparsegpt: added to the Hessian's diagonal, relative to its mean (0.01)")
    add("--include", nargs="+", default=(), choices=("head", "embeddings"), help="prune these too; dense otherwise")
    add("--masks", metavar="PATH", help="method mask: a mask file, or a pruned model whose masks or zeros are taken")
    parsing.add_dtype(parser, "type of the written weights; auto: as in the model's file")
    options = vars(parser.parse_args())
    model, out = options.pop("model"), options.pop("out")

    environment.deepspeed_on_cpu()
    environment.equal_bits()
    from ds_llm.pruning.prune import Options, prune

    options |= {"data": tuple(options["data"]), "include": tuple(options["include"])}
    try:
        found = prune(model, out, Options(**options))
    except KeyboardInterrupt:
        raise UserError("interrupted; nothing was written", exit_code=130) from None
    print(
        f"kept {found['density']:.2%} of {found['weights']:,} weights in {len(found['layers'])} matrices "
        f"({found['parameters']:,} parameters in all), {found['seconds']:.0f} s"
    )
    print(f"wrote {out}")
