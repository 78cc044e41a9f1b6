"""Chat templates by name or from a file, and the token that ends a turn in one."""

from __future__ import annotations

from pathlib import Path

from ds_llm.data import chat
from ds_llm.errors import UserError

FOLDER = Path(__file__).parent / "templates"
# Templates that come with the project, each with the tokens that it writes beside bos_token and eos_token
TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": ("[INST]", "[/INST]"),
    "alpaca": (),
}


def set_template(tokenizer, template: str) -> None:
    """Set the chat template that a user names: a .jinja file, a template of the tokenizer's own, or one of `TOKENS`.

    Raises `UserError` for an unknown name, a file that cannot be read, or tokens that the tokenizer does not have.
    """
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if template in own:
        tokenizer.chat_template = own[template]
    elif template in TOKENS:
        _check_tokens(tokenizer, template)
        tokenizer.chat_template = (FOLDER / f"{template}.jinja").read_text().rstrip("\n")
    elif template.endswith((".jinja", ".j2", ".txt")):
        try:
            tokenizer.chat_template = Path(template).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template: {template}: cannot be read ({error})") from None
    else:
        raise UserError(
            f"data.chat_template: {template}: neither a .jinja file nor one of {', '.join([*own, *TOKENS])}"
        )


def _check_tokens(tokenizer, name: str) -> None:
    missing = [token for token in TOKENS[name] if token not in tokenizer.get_added_vocab()]
    missing = [token for token in missing if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1]
    if missing:
        raise UserError(
            f"data.chat_template: {name} writes {' '.join(missing)}, which the tokenizer cuts into pieces; add them: "
            f"model.add_tokens='[{','.join(missing)}]'"
        )
    if "eos_token" in (FOLDER / f"{name}.jinja").read_text() and tokenizer.eos_token is None:
        raise UserError(f"data.chat_template: {name} ends turns with the eos_token, which the tokenizer lacks")


def turn_end(tokenizer) -> int | None:
    """Id of the first token behind an answer in the chat template, where that is a special or added token."""
    if not tokenizer.chat_template:
        return None
    try:
        ender = chat.end_of_turn(tokenizer)
    except (UserError, chat.Unmaskable):  # a template for other messages
        return None
    first = tokenizer(ender, add_special_tokens=False)["input_ids"][:1]
    return next(iter(set(first) & {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}), None)
