import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_llm.data.tokenizer import load_tokenizer, train_tokenizer
from ds_llm.data.tokens import tokenizer_hash
from ds_llm.errors import UserError

from .conftest import write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@settings(max_examples=100)
@given(text=st.text())
def test_any_text_decodes_to_itself(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_special_tokens_and_digits(tokenizer):
    assert len(tokenizer) == 400
    names = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert names == (0, 0, 1, 2)
    assert [tokenizer.decode(i) for i in tokenizer.encode("1234")] == list("1234")


def test_the_chat_template_marks_what_the_assistant_says(tokenizer):
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "of the"},
        {"role": "assistant", "content": "naïve 42"},
        {"role": "user", "content": "the"},
        {"role": "assistant", "content": "of"},
    ]
    out = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    said = [i for i, marked in zip(out["input_ids"], out["assistant_masks"], strict=True) if marked]
    assert tokenizer.decode(said) == "naïve 42<|im_end|>of<|im_end|>"
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n")
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(prompt)


def test_training_is_reproducible_and_frequent_words_become_tokens(tmp_path, rng):
    rows = [{"text": " ".join(rng.choices(["lorem", "ipsum", "dolor"], k=30))} for _ in range(100)]
    write_jsonl(tmp_path / "a.jsonl", [*rows, {"other": 1}])
    result = train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "one", vocab_size=300)
    train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "two", vocab_size=300)
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    assert tokenizer_hash(tmp_path / "one") == tokenizer_hash(tmp_path / "two")
    tokenizer = load_tokenizer(tmp_path / "one")
    assert len(tokenizer.encode(" lorem ipsum dolor")) == 3
    assert result["vocab_size"] == len(tokenizer) < 300  # three words hold no more merges
    assert result["dropped"] == {"missing field": 1}
    reject = json.loads((tmp_path / "one.rejects.jsonl").read_text())
    assert (reject["line"], reject["reason"]) == (101, "missing field")


def test_mistakes_are_user_errors(tmp_path):
    source = tmp_path / "a.jsonl"
    write_jsonl(source, [{"text": "some text"}])
    with pytest.raises(UserError, match="at least 259"):
        train_tokenizer([source], tmp_path / "out", vocab_size=258)
    with pytest.raises(UserError, match="nothing to train on: none of the 1 rows"):
        train_tokenizer([source], tmp_path / "out", field="body")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "out").mkdir()  # an empty folder is no obstacle
    train_tokenizer([source], tmp_path / "out", vocab_size=260)
    first = (tmp_path / "out/tokenizer.json").read_bytes()
    train_tokenizer([source], tmp_path / "out", vocab_size=260)
    with pytest.raises(UserError, match="another vocab_size"):
        train_tokenizer([source], tmp_path / "out", vocab_size=261)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == first
    train_tokenizer([source], tmp_path / "out", vocab_size=261, overwrite=True)
    assert (tmp_path / "out/tokenizer.json").read_bytes() != first
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        train_tokenizer([source], tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/x").write_text("precious")
    with pytest.raises(UserError, match="of unknown origin"):
        train_tokenizer([source], tmp_path / "mine")
