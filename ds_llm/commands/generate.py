"""Generate text with a causal language model: a hub name, or the folder of a model, a run or a checkpoint.

  generate.py --model runs/pretrain --prompt "To be, or not to be" --stream
  generate.py --model MODEL --interactive --chat --system "You answer briefly."
  generate.py --model MODEL --batch-file prompts.jsonl --output answers.jsonl --greedy

The prompt itself is not printed. See docs/generation.md.
"""

import argparse

from ds_llm.commands import parsing
from ds_llm.errors import UserError
from ds_llm.generation.sampling import SamplingParams, add_arguments, from_arguments


def build_parser() -> argparse.ArgumentParser:
    parser = parsing.new_parser(__doc__)
    parser.add_argument("--model", required=True, help="folder, hub name, run, checkpoint, adapter or .gguf file")
    parser.add_argument("--tokenizer", help="tokenizer folder (default: the model's)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="continue this text (answer it with --chat)")
    what.add_argument("--interactive", action="store_true", help="answer what is typed, line by line")
    what.add_argument(
        "--batch-file", metavar="PATH", help="prompts: .jsonl rows with prompt or messages, or .txt lines"
    )
    parser.add_argument("--stream", action="store_true", help="with --prompt: print the text as it is made")
    parser.add_argument("--chat", action="store_true", help="render prompts by the tokenizer's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message of a chat; implies --chat")
    parser.add_argument("--output", metavar="PATH", help="with --batch-file: write the JSON lines here, not to stdout")
    parser.add_argument("--batch-size", type=int, metavar="N", help="with --batch-file: prompts at a time (8)")
    parsing.add_dtype(parser)
    parser.add_argument(
        "--attention", default="auto", choices=("auto", "sdpa", "flash_attention_2", "eager"), help="attention kernel"
    )
    add_arguments(parser)
    return parser


def main() -> None:
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.batch_file is None and (arguments.output or arguments.batch_size is not None):
        parser.error("--output and --batch-size need --batch-file")
    if arguments.stream and arguments.prompt is None:
        parser.error("--stream needs --prompt (--interactive always streams)")
    try:
        generate(arguments, from_arguments(arguments))
    except KeyboardInterrupt:
        raise UserError("interrupted", exit_code=130) from None


def generate(arguments: argparse.Namespace, params: SamplingParams) -> None:
    from ds_llm.generation.generator import Generator
    from ds_llm.generation.prompts import complete_file, conversation, converse

    generator = Generator(arguments.model, arguments.tokenizer, dtype=arguments.dtype, attention=arguments.attention)
    chat = arguments.chat or arguments.system is not None
    if arguments.interactive:
        converse(generator, params, chat, arguments.system)
    elif arguments.batch_file is not None:
        options = {} if arguments.batch_size is None else {"batch_size": arguments.batch_size}
        complete_file(generator, arguments.batch_file, params, arguments.output, chat, arguments.system, **options)
    else:
        prompt = conversation(arguments.prompt, arguments.system) if chat else arguments.prompt
        if arguments.stream:
            generator.generate(prompt, params, callback=lambda piece: print(piece, end="", flush=True))
            print()
        else:
            print("\n---\n".join(one.text for one in next(generator.complete([prompt], params))))
