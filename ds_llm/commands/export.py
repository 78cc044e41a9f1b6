"""Merge an adapter into its base model and write a Hugging Face folder: safetensors, tokenizer, chat template.

  export.py --model runs/lora --out models/merged
  export.py --model runs/sft/checkpoints/step-00000100 --out models/sft --dtype bf16
  export.py --model runs/sparse --out models/sparse --compact --dtype bf16

The merged model's logits are compared with those of the model with its adapter, and those of the folder read back; the
largest differences are printed, and nothing is written when they are more than rounding. See docs/sft.md.
"""

from ds_llm.commands import environment, parsing


def main() -> None:
    parser = parsing.new_parser(__doc__)
    parser.add_argument("--model", required=True, help="adapter, run, checkpoint, model folder, hub name or .gguf file")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new or empty folder to write")
    parsing.add_dtype(parser, "type of the written weights; auto: as in the base model's file")
    parser.add_argument(
        "--compact", action="store_true", help="of a pruned model: kept values and bits instead of dense weights"
    )
    arguments = parser.parse_args()

    environment.deepspeed_on_cpu()
    from ds_llm.convert.export import export

    found = export(arguments.model, arguments.out, arguments.dtype, arguments.compact)
    if found.base is not None:
        print(f"base model: {found.base}")
    if found.effect is not None:
        print(f"the adapter changes the logits by up to {found.effect:.3g} (largest logit {found.largest:.3g})")
        print(f"merged against adapter, fp32: largest difference of the logits {found.merge:.3g}")
    print(f"read back from {found.dtype}: largest difference of the logits {found.rounding:.3g}")
    print(f"wrote {found.folder}")
