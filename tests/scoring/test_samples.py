"""Rows as samples: which tokens go in and which count, for every format, against transformers called directly."""

import json

import numpy as np
import pytest
from chats import conversations

from ds_llm.data import files, rows
from ds_llm.pretrained.loading import load_tokenizer
from ds_llm.scoring.samples import BAD, COUNTS, NO_OBJECT, SCORED, decode, encoder

PLAIN = {"tokens": "answers", "template": "auto", "max_length": None, "truncate": "right"}


@pytest.fixture(scope="module")
def tokenizer(chats):
    return load_tokenizer(chats / "llama")


def encode(tokenizer, lines, format, metrics=("entropy",), taken=(), **options):
    data = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    batch = rows.Batch(0, "lines", 1, data, files.Position(0, len(lines)), len(data))
    return encoder(tokenizer, metrics, **(PLAIN | options), taken=taken)((format, batch))


def samples(block):
    starts = np.append(0, block.rows["end"][:-1])
    return [decode(block.tokens[a:b]) for a, b in zip(starts, block.rows["end"], strict=True)]


def test_texts_count_from_the_second_token_on(tokenizer):
    texts = ["reverse red blue", "cat", "spelt <|im_end|> tokens are text", "dög"]
    block = encode(tokenizer, [{"text": text} for text in texts], "text")
    for text, sample, row in zip(texts, samples(block), block.rows, strict=True):
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert sample.input_ids.tolist() == ids
        assert sample.scored.tolist() == [False] + [True] * (len(ids) - 1)
        assert (row["kind"], row["cost"], row["scored"]) == (SCORED, len(ids), len(ids) - 1)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in block.tokens % COUNTS


def test_conversations_count_their_answers(tokenizer):
    given = list(conversations(20, np.random.default_rng().integers(1 << 30)))
    for tokens in ("answers", "last", "all"):
        block = encode(tokenizer, given, "messages", tokens=tokens)
        for row, sample in zip(given, samples(block), strict=True):
            assert sample.input_ids.tolist() == tokenizer.apply_chat_template(row["messages"])["input_ids"]
            said = [m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"]
            counted = tokenizer.decode(sample.input_ids[sample.scored])
            if tokens == "all":
                assert sample.scored.tolist() == [False] + [True] * (len(sample) - 1)
            else:
                assert counted == "".join(said if tokens == "answers" else said[-1:])


def test_a_conversation_without_an_answer_is_a_sample_of_which_nothing_counts(tokenizer):
    block = encode(tokenizer, [{"messages": [{"role": "user", "content": "red"}]}], "messages")
    assert block.rows["kind"].tolist() == [SCORED] and block.rows["scored"].tolist() == [0] and block.rows["end"][0] > 3


@pytest.mark.parametrize("template", ["auto", "none"])
def test_prompts_with_completions_by_the_template_or_one_after_the_other(tokenizer, template):
    row = {"prompt": "reverse red blue", "completion": " blue red"}
    block = encode(tokenizer, [row], "prompt_completion", template=template)
    sample = samples(block)[0]
    text, counted = tokenizer.decode(sample.input_ids), tokenizer.decode(sample.input_ids[sample.scored])
    if template == "none":
        assert text == "reverse red blue blue red" and counted == " blue red"
    else:
        assert text.startswith("<|im_start|>user\nreverse") and counted == " blue red<|im_end|>"
    refused = [{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, {**row, "system": "c"}]
    block = encode(tokenizer, refused, "prompt_completion", template=template)
    assert block.rows["kind"].tolist() == ([BAD, BAD] if template == "none" else [SCORED, SCORED])


def test_a_beginning_of_text_token_that_the_tokenizer_adds_is_there_without_a_template(tokenizer, monkeypatch):
    plain = type(tokenizer).__call__

    def with_bos(self, text, **options):
        out = plain(self, text, **options)
        if options.get("add_special_tokens", True):
            out["input_ids"] = [self.bos_token_id, *out["input_ids"]]
        return out

    monkeypatch.setattr(type(tokenizer), "__call__", with_bos)
    row = {"prompt": "red", "completion": " blue"}
    sample = samples(encode(tokenizer, [row], "prompt_completion", template="none"))[0]
    assert sample.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(sample.input_ids[1:]) == "red blue"
    assert tokenizer.decode(sample.input_ids[sample.scored]) == " blue"


def test_long_rows_are_cut_or_refused_and_the_loss_is_counted(tokenizer):
    row = {"messages": [{"role": "user", "content": "reverse " + "red " * 20}, {"role": "assistant", "content": "sun"}]}
    whole = samples(encode(tokenizer, [row], "messages"))[0]
    n, k = len(whole), len(whole.targets)
    block = encode(tokenizer, [row], "messages", max_length=n)
    assert not block.rows["truncated"][0] and block.lost == 0
    block = encode(tokenizer, [row], "messages", max_length=n - 2)  # behind the answer stand a newline and its end
    assert block.rows["truncated"][0] and block.rows["end"][0] == n - 2 and block.lost == 1
    assert block.rows["scored"][0] == k - 1
    block = encode(tokenizer, [row], "messages", max_length=n - 2, truncate="left")
    assert samples(block)[0].input_ids.tolist() == whole.input_ids[2:].tolist() and block.lost == 0
    for options, reason in (({"max_length": 9}, "cut off"), ({"max_length": n - 1, "truncate": "error"}, "too long")):
        block = encode(tokenizer, [row], "messages", **options)
        assert block.rows["kind"].tolist() == [BAD] and [e[2] for e in block.errors] == [reason]
        assert len(block.tokens) == 0 and block.rows["cost"][0] == 0


def test_bad_rows_keep_their_place_and_their_reason(tokenizer):
    lines = [{"text": "red"}, "{bad", "", "[1]", {"other": 1}, {"text": 7}, {"text": " "}, '{"text": "\\ud800"}']
    block = encode(tokenizer, [*lines, {"text": "blue"}], "text")
    assert block.rows["kind"].tolist() == [SCORED, NO_OBJECT, NO_OBJECT, NO_OBJECT, BAD, BAD, BAD, BAD, SCORED]
    assert [(place, line) for place, line, *_ in block.errors] == [(i, i + 1) for i in range(1, 8)]
    reasons = ["bad JSON", "empty", "wrong type", "missing field", "wrong type", "empty", "not UTF-8"]
    assert [reason for *_, reason, _ in block.errors] == reasons
    assert [len(sample) > 0 for sample in samples(block)] == [True] + [False] * 7 + [True]


def test_the_cost_is_that_of_the_metrics_and_taken_names_are_found(tokenizer):
    row = {"prompt": "reverse red", "completion": "red"}
    one, two = (encode(tokenizer, [row], "prompt_completion", m) for m in (["entropy"], ["entropy", "ifd"]))
    assert two.rows["cost"][0] == one.rows["cost"][0] + 1 + one.rows["scored"][0]
    assert encode(tokenizer, [row, {**row, "x": 1}], "prompt_completion", taken=["y", "x"]).taken == (2, "x")
    assert encode(tokenizer, [row], "prompt_completion", taken=["y"]).taken is None
