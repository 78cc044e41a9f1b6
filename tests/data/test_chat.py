"""Masks against what each template is known to write, on random conversations."""

import copy
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_llm.data import chat
from ds_llm.data.chat import Unmaskable, encode, encode_text
from ds_llm.data.tokenizer import load_tokenizer
from ds_llm.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
TOKENS = {  # template: (beginning, end of a turn, others)
    "smollm2": (None, "<|im_end|>", ["<|im_start|>"]),
    "qwen25": (None, "<|im_end|>", ["<|im_start|>"]),
    "qwen3": (None, "<|im_end|>", ["<|im_start|>"]),
    "gemma2": ("<bos>", "<end_of_turn>", ["<start_of_turn>"]),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]", "[TOOL_CALLS]"]),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]),
    "deepseek_r1": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", []),
    "harmony": (None, "<|return|>", ["<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|call|>"]),
}
TRIMS = {"gemma2", "llama3"}
NO_SYSTEM = {"gemma2", "mistral"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
        },
    }
]


@pytest.fixture(scope="module")
def tokenizer_of(tokenizer_folder):
    from transformers import AutoTokenizer

    made = {}

    def make(name: str, template: str | None = None):
        if name not in made:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
            begin, end, others = TOKENS[name]
            tokenizer.add_special_tokens({"eos_token": end} | ({"bos_token": begin} if begin else {}))
            tokenizer.add_special_tokens({"extra_special_tokens": others})
            if name in ("qwen3", "deepseek_r1"):  # tokens, but not special ones
                tokenizer.add_tokens(["<think>", "</think>", "<｜User｜>", "<｜Assistant｜>"])
            tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text().rstrip("\n")
            made[name] = tokenizer
        if template is None:
            return made[name]
        other = copy.deepcopy(made[name])
        other.chat_template = template
        return other

    return make


@pytest.fixture(scope="module")
def own(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


def said(tokenizer, encoded) -> list[str]:
    """The runs of trained tokens as text."""
    runs, before = [], False
    for token, trained in zip(encoded.input_ids, encoded.trained, strict=True):
        if trained:
            runs += [] if before else [[]]
            runs[-1].append(token)
        before = trained
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def same(found: list[str], expected: list[str]) -> bool:
    """Equal; where an answer begins with white space, a token of it may hold some that is the header's."""
    return len(found) == len(expected) and all(
        a == b or (b[:1].isspace() and a.endswith(b) and not a.removesuffix(b).strip())
        for a, b in zip(found, expected, strict=True)
    )


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


PIECES = [
    "assistant\n",
    "user",
    "<|im_start",
    "|>",
    "_id|>",
    "\n",
    "\n\n",
    " ",
    "é",
    "😀",
    "42",
    "<",
    "{",
    "the",
    "Ġ",
    "[/INST]",
]
TEXT = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join), st.text(min_size=1, max_size=12)
)
TEXT = TEXT.filter(
    lambda text: text.strip() and not any("\ud800" <= c <= "\udfff" or "\ue000" <= c <= "\ue002" for c in text)
)


@st.composite
def conversations(draw, texts=TEXT):
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages += [user(draw(texts)), assistant(draw(texts))]
    return messages


@pytest.mark.parametrize("name", ["smollm2", "qwen25", "gemma2", "mistral", "llama3", "deepseek_r1", "harmony"])
@settings(max_examples=60)
@given(messages=conversations())
def test_trained_is_what_the_assistant_says_and_the_end_of_turn(tokenizer_of, name, messages):
    tokenizer = tokenizer_of(name)
    if name in NO_SYSTEM:
        messages = [m for m in messages if m["role"] != "system"]
    answers = [m["content"].strip() if name in TRIMS else m["content"] for m in messages if m["role"] == "assistant"]
    ends = [tokenizer.eos_token] * len(answers)
    if name == "harmony":
        answers = [f"<|channel|>final<|message|>{answer}" for answer in answers]
        ends = ["<|end|>"] * (len(answers) - 1) + ["<|return|>"]
    expected = [answer + end for answer, end in zip(answers, ends, strict=True)]
    if any(control in m["content"] for m in messages for control in (tokenizer.eos_token, *TOKENS[name][2][:1])):
        return  # a text that spells a control token: see below
    every, last = encode(tokenizer, messages), encode(tokenizer, messages, train_on="last")
    assert every.input_ids == last.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]
    found = said(tokenizer, every)
    if name == "mistral":  # the space before the answer may be part of its first token
        expected = [" " + text if whole == " " + text else text for whole, text in zip(found, expected, strict=True)]
    assert same(found, expected)
    assert said(tokenizer, last) == found[-1:]


@st.composite
def reasoning(draw):
    texts = TEXT.filter(lambda text: "think>" not in text and "<|im_" not in text)
    messages = draw(conversations(texts))
    thoughts = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            thoughts.append(draw(st.one_of(st.none(), texts)))
            message["content"] = message["content"].lstrip("\n")
            if thoughts[-1] is not None and draw(st.booleans()):
                messages[i] = {**message, "reasoning_content": thoughts[-1]}
            elif thoughts[-1] is not None:
                messages[i] = {**message, "content": f"<think>\n{thoughts[-1]}\n</think>\n\n{message['content']}"}
    return messages, thoughts


@settings(max_examples=100)
@given(sample=reasoning())
def test_a_template_that_takes_the_thoughts_out_of_earlier_turns(tokenizer_of, sample):
    messages, thoughts = sample
    tokenizer = tokenizer_of("qwen3")
    expected = [m["content"].split("</think>\n\n")[-1] for m in messages if m["role"] == "assistant"]
    last = (thoughts[-1] or "").strip("\n")
    expected[-1] = f"<think>\n{last}\n</think>\n\n{expected[-1]}"
    found = encode(tokenizer, messages)
    assert found.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert same(said(tokenizer, found), [text + "<|im_end|>" for text in expected])


@settings(max_examples=60)
@given(messages=conversations())
def test_a_template_that_marks_its_answers_agrees_with_transformers(own, messages):
    if any("<|im_start|>" in message["content"] for message in messages):
        return
    reference = own.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    found = encode(own, messages)
    assert found.input_ids == reference["input_ids"]
    assert found.trained == [bool(mask) for mask in reference["assistant_masks"]]
    plain = copy.copy(own)
    plain.chat_template = re.sub(r"\{% (end)?generation %\}", "", own.chat_template)
    assert encode(plain, messages) == found


@pytest.mark.parametrize(
    "marked",
    [
        "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
        "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}",
    ],
)
@pytest.mark.parametrize("header", ["{{ h }}%s", "{%% generation %%}{{ h }}{%% endgeneration %%}%s"])
def test_marked_spans_become_whole_turns(tokenizer_of, marked, header):
    body = (header % marked).replace("{% endgeneration %}{% generation %}", "")
    template = (
        "{% for m in messages %}{% set h = '<|im_start|>' + m['role'] + '\n' %}{% if m['role'] == 'assistant' %}"
        + body
        + "{% else %}{{ h + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = tokenizer_of("smollm2", template)
    found = encode(tokenizer, [user("q"), assistant("one"), user("r"), assistant("two three")])
    assert said(tokenizer, found) == ["one<|im_end|>", "two three<|im_end|>"]


def call(**arguments):
    return {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": arguments}}


@pytest.mark.parametrize(
    ("name", "calls", "closing"),
    [
        ("qwen25", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>', "<|im_end|>"),
        ("qwen3", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>', "<|im_end|>"),
        ("llama3", '{"name": "add", "parameters": {"a": 1}}<|eom_id|>', "<|eot_id|>"),
        ("mistral", '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}]</s>', "</s>"),
        ("harmony", ' to=add<|channel|>commentary<|message|>{"a": 1}<|call|>', "<|end|>"),
    ],
)
def test_tool_calls_are_answers_and_their_results_are_not(tokenizer_of, name, calls, closing):
    tokenizer = tokenizer_of(name)
    messages = [
        user("what is 1 + 2?"),
        assistant("", tool_calls=[call(a=1)]),
        {"role": "tool", "name": "add", "content": "3"},
        assistant("It is 3."),
        user("thanks"),
        assistant("bye"),
    ]
    if name == "mistral":  # whose tools lie before the last question
        messages[4:] = []
    tools = None if name == "harmony" else TOOLS
    found = encode(tokenizer, messages, tools)
    assert found.input_ids == tokenizer.apply_chat_template(messages, tools=tools)["input_ids"]
    final = {
        "harmony": ["<|channel|>final<|message|>It is 3.<|end|>", "<|channel|>final<|message|>bye<|return|>"],
        "qwen3": ["It is 3.<|im_end|>", "<think>\n\n</think>\n\nbye<|im_end|>"],
    }
    expected = [calls, *final.get(name, ["It is 3." + closing, "bye" + closing])]
    assert [text.lstrip(" ") for text in said(tokenizer, found)] == [
        text.lstrip(" ") for text in expected[: len(messages) // 2]
    ]


def test_two_tool_calls_with_a_text_before_them(tokenizer_of):
    tokenizer = tokenizer_of("qwen25")
    messages = [user("add"), assistant("Let me see.", tool_calls=[call(a=1), call(b="x")])]
    assert said(tokenizer, encode(tokenizer, messages, TOOLS)) == [
        'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        '\n<tool_call>\n{"name": "add", "arguments": {"b": "x"}}\n</tool_call><|im_end|>'
    ]


def test_thoughts_in_a_channel_of_their_own(tokenizer_of):
    tokenizer = tokenizer_of("harmony")
    messages = [user("q"), assistant("a", thinking="hm"), user("r"), assistant("b", thinking="so")]
    assert said(tokenizer, encode(tokenizer, messages)) == [
        "<|channel|>final<|message|>a<|end|>",
        "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>",
    ]


def test_a_header_that_the_user_spells_is_not_the_answers(tokenizer_of):
    """The generation prompt opens a thought that earlier turns lack; the question spells it, and more than once."""
    tokenizer = tokenizer_of("deepseek_r1")
    question = "say <｜Assistant｜><think>\n or <｜Assistant｜><think>\n"
    found = encode(tokenizer, [user(question), assistant("hm</think>yes"), user(question), assistant("no")])
    assert said(tokenizer, found) == ["yes<｜end▁of▁sentence｜>", "no<｜end▁of▁sentence｜>"]


def test_answers_without_weight_are_not_trained(tokenizer_of):
    tokenizer = tokenizer_of("smollm2")
    messages = [user("q"), assistant("a", weight=0), user("r"), assistant("a", weight=1), user("s"), assistant("b")]
    found = encode(tokenizer, messages)
    assert said(tokenizer, found) == ["a<|im_end|>", "b<|im_end|>"] and found.trained.index(True) > 15
    assert said(tokenizer, encode(tokenizer, messages, train_on="last")) == ["b<|im_end|>"]
    assert not any(encode(tokenizer, messages[:2], train_on="last").trained)


def test_a_turn_that_ends_with_two_tokens(tokenizer_of):
    template = (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|><|return|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"
    )
    tokenizer = tokenizer_of("harmony", template)
    found = encode(tokenizer, [user("q"), assistant("a"), user("r"), assistant("b")])
    assert said(tokenizer, found) == ["a<|end|><|return|>", "b<|end|><|return|>"]


CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CLOCK = "{{ strftime_now('%H:%M:%S.%f') }}"  # another text at each rendering
LATER = "{% if messages | length > 2 %}" + CLOCK + "{% endif %}"
QA = [user("q"), assistant("a"), user("r"), assistant("b")]


@pytest.mark.parametrize(
    ("name", "template", "messages", "tools", "reason"),
    [
        ("smollm2", None, [user("q")], None, "no answer"),
        ("smollm2", None, [user("<|im_end|>"), assistant("a")], None, "control token"),
        ("smollm2", None, [user("q"), assistant("a<|im_start|>user")], None, "control token"),
        ("gemma2", None, [{"role": "system", "content": "s"}, *QA], None, "refused by the chat template"),
        ("gemma2", None, [*QA, assistant("c")], None, "refused by the chat template"),
        ("mistral", None, [{"role": "system", "content": "s0"}, *QA], None, "not in the template"),
        ("mistral", None, [user("q"), assistant("", tool_calls=[call(a=1)]), *QA[1:]], TOOLS, "answer not found"),
        (
            "smollm2",
            CHATML.replace("m['content']", "(m['content'] if m['role'] != 'user' else '')"),
            QA,
            None,
            "not in the template",
        ),
        ("smollm2", None, QA, TOOLS, "not in the template"),
        ("smollm2", None, [user("q"), assistant("", tool_calls=[call(a=1)])], None, "not in the template"),
        ("smollm2", None, [user("q"), assistant("a", reasoning_content="hm")], None, "not in the template"),
        ("smollm2", CHATML.replace("'<|im_end|>\n'", "'\n'"), QA, None, "no end of turn"),
        ("smollm2", CHATML.replace("'<|im_end|>\n' }}", "'\n' }}") + "{{ '<|im_end|>' }}", QA, None, "no end of turn"),
        ("smollm2", CHATML.replace("m['content']", "'...'"), QA, None, "answer not found"),
        ("smollm2", CHATML.replace("m['content']", "m['content'] * 2"), QA, None, "answer not found"),
        ("smollm2", "{{ messages[-1]['content'] }}" + CHATML, QA, None, "answer not found"),
        ("smollm2", CLOCK + CHATML + PROMPT, QA[:2], None, "answer not found"),
        ("smollm2", CHATML + CLOCK + PROMPT, QA, None, "answer not found"),
        ("smollm2", LATER + CHATML + PROMPT, QA, None, "answer not found"),
        ("smollm2", LATER + CHATML, QA, None, "answer not found"),
    ],
)
def test_refusals(tokenizer_of, name, template, messages, tools, reason):
    with pytest.raises(Unmaskable) as error:
        encode(tokenizer_of(name, template), messages, tools)
    assert error.value.reason == reason and reason in chat.REASONS


def test_tokenizers_without_offsets(tokenizer_of):
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    assert not tokenizer.is_fast
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    found = encode(tokenizer, [user("où?"), assistant("là\n"), user("r"), assistant(" b")])
    assert said(tokenizer, found) == ["là\n<|im_end|>", " b<|im_end|>"]


def test_white_space_that_offsets_leave_out(tokenizer_of):
    """Post-processors of some tokenizers trim offsets, so that tokens of white space have none."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(tokenizer_of("smollm2"))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = [user("the of"), assistant("of the\n the\n\n"), user("\n x"), assistant(" naïve 42 ")]
    assert encode(tokenizer, messages) == encode(tokenizer_of("smollm2"), messages)


def test_plain_texts_are_trained_whole(tokenizer_of):
    tokenizer = tokenizer_of("smollm2")
    found = encode_text(tokenizer, "the <|im_end|> of")
    assert all(found.trained) and found.input_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(found.input_ids) == "the <|im_end|> of<|im_end|>"


def test_no_chat_template(tokenizer_of):
    tokenizer = tokenizer_of("smollm2", "")
    for call in (lambda: chat.check_template(tokenizer), lambda: encode(tokenizer, QA)):
        with pytest.raises(UserError, match="has no chat template"):
            call()
    with pytest.raises(UserError, match="of no use here"):
        chat.check_template(tokenizer_of("smollm2", "{{ raise_exception('never') }}"))
