"""Chat templates by name against what their grammar says, and what is refused."""

from pathlib import Path

import pytest

from ds_llm.data import chat
from ds_llm.data.chat_templates import TOKENS, set_template, turn_end
from ds_llm.data.tokenizer import load_tokenizer
from ds_llm.errors import UserError
from ds_llm.pretrained.added_tokens import add_tokens

SYSTEM, TURNS = "Be brief.", [("Hi there", "Hello."), ("2 + 2?", "It is 4")]
MESSAGES = [{"role": "system", "content": SYSTEM}]
for asked, said in TURNS:
    MESSAGES += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def reference(name: str, bos: str, eos: str) -> tuple[str, list[str]]:
    """The whole text, and what of it is trained: each answer with the token that ends its turn."""
    if name == "chatml":
        end, head = "<|im_end|>", "<|im_start|>{}\n".format
        text = head("system") + SYSTEM + end + "\n"
        text += "".join(f"{head('user')}{q}{end}\n{head('assistant')}{a}{end}\n" for q, a in TURNS)
        return text, [a + end for _, a in TURNS]
    if name == "llama3":
        end, head = "<|eot_id|>", "<|start_header_id|>{}<|end_header_id|>\n\n".format
        text = bos + head("system") + SYSTEM + end
        text += "".join(f"{head('user')}{q}{end}{head('assistant')}{a}{end}" for q, a in TURNS)
        return text, [a + end for _, a in TURNS]
    if name == "gemma":
        end, first = "<end_of_turn>", [SYSTEM + "\n\n", ""]
        turns = zip(first, TURNS, strict=True)
        text = "".join(f"<start_of_turn>user\n{s}{q}{end}\n<start_of_turn>model\n{a}{end}\n" for s, (q, a) in turns)
        return bos + text, [a + end for _, a in TURNS]
    if name == "mistral":
        turns = zip([SYSTEM + "\n\n", ""], TURNS, strict=True)
        return bos + "".join(f"[INST] {s}{q} [/INST] {a}{eos}" for s, (q, a) in turns), [f" {a}{eos}" for _, a in TURNS]
    text = "".join(f"### Instruction:\n{q}\n\n### Response:\n{a}{eos}\n\n" for q, a in TURNS)
    return f"{bos}{SYSTEM}\n\n{text}", [a + eos for _, a in TURNS]


@pytest.fixture
def tokenizer(tokenizer_folder):
    made = load_tokenizer(tokenizer_folder)
    made.chat_template = None
    return made


@pytest.mark.parametrize("name", TOKENS)
def test_a_named_template_writes_its_grammar_and_trains_the_answers(tokenizer, name):
    add_tokens(tokenizer, TOKENS[name])
    set_template(tokenizer, name)
    text, trained = reference(name, tokenizer.bos_token, tokenizer.eos_token)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == text
    encoded = chat.encode(tokenizer, MESSAGES)
    assert encoded.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    learnt = [i for i, wanted in zip(encoded.input_ids, encoded.trained, strict=True) if wanted]
    assert tokenizer.decode(learnt) == "".join(trained)
    prompt = tokenizer.apply_chat_template(MESSAGES[:-1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and text[len(prompt) :].strip() == trained[-1].strip()
    end = TOKENS[name][-1] if TOKENS[name] and name != "mistral" else tokenizer.eos_token
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids(end)


def test_a_template_whose_tokens_are_missing_says_which_to_add(tokenizer):
    with pytest.raises(UserError, match=r"llama3 writes .* add them: model\.add_tokens='\[<\|start_header_id\|>,"):
        set_template(tokenizer, "llama3")
    set_template(tokenizer, "alpaca")  # has none
    with pytest.raises(UserError, match=r"^data\.chat_template: chatlm: neither a \.jinja file nor one of chatml, "):
        set_template(tokenizer, "chatlm")
    with pytest.raises(UserError, match=r"^data\.chat_template: nowhere\.jinja: cannot be read"):
        set_template(tokenizer, "nowhere.jinja")


def test_a_file_or_one_of_the_tokenizers_own_templates_is_taken(tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    set_template(tokenizer, str(tmp_path / "own.jinja"))
    assert tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False) == f"system: {SYSTEM}<|im_end|>"
    tokenizer.chat_template = {"tool_use": "{{ 'tools' }}", "rag": tokenizer.chat_template}
    with pytest.raises(UserError, match=r"has the chat templates tool_use, rag and none called default; .*=tool_use$"):
        chat.check_template(tokenizer)
    assert turn_end(tokenizer) is None
    set_template(tokenizer, "rag")
    chat.check_template(tokenizer)
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


PERSONA = (
    "{% if persona is defined %}{{ 'You are ' + persona + '.\\n' }}{% endif %}"
    "{% for message in messages %}{% set said = message['content'] %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + said + '<|im_end|>\\n' }}{% endfor %}"
)


def test_a_template_gets_the_columns_that_it_reads_and_no_other(tokenizer):
    tokenizer.chat_template = PERSONA
    assert chat.variables(PERSONA) == {"persona"}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    plain = chat.encode(tokenizer, messages)
    told = chat.encode(tokenizer, messages, None, {"persona": "kind", "said": "no", "messages": "no", "source": "no"})
    assert told.input_ids == tokenizer.apply_chat_template(messages, persona="kind")["input_ids"] != plain.input_ids
    assert chat.encode(tokenizer, messages, None, {"source": "x"}) == plain
    trained = [[i for i, t in zip(e.input_ids, e.trained, strict=True) if t] for e in (plain, told)]
    assert trained[0] == trained[1] and tokenizer.decode(trained[0]) == "hello<|im_end|>"


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "templates").glob("*.jinja")), ids=lambda p: p.stem)
def test_variables_are_none_that_every_rendering_has(path):
    assert not chat.variables(path.read_text()) & {"messages", "message", "loop", "bos_token", "tools"}
