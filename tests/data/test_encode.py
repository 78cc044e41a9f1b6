import json

import numpy as np
import pytest

from ds_llm.data.encode import encode
from ds_llm.data.tokens import TokenData, TokenFile
from ds_llm.errors import UserError

from .conftest import write_jsonl
from .test_files import make


def reference(tokenizer, texts):
    """Ids of each text by transformers, with the end-of-text token."""
    return [
        [*tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], tokenizer.eos_token_id]
        for text in texts
    ]


def documents(path):
    file = TokenFile(path)
    file.verify()
    return [file.tokens[a:b].tolist() for a, b in zip(file.boundaries[:-1], file.boundaries[1:], strict=True)]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_tokens_equal_those_of_transformers(tmp_path, rng, texts, tokenizer, tokenizer_folder, workers):
    texts = [*texts, "text that spells <|im_end|> and <|endoftext|>", " leading and trailing \n"]
    rng.shuffle(texts)
    rows = [{"text": text} for text in texts]
    rows.insert(7, {"text": None})
    rows.insert(3, {"text": "  "})
    write_jsonl(tmp_path / "a.jsonl", rows)
    out = tmp_path / "out.bin"
    result = encode([tmp_path / "a.jsonl"], out, tokenizer_folder, workers=workers, batch_bytes=rng.choice([300, 9999]))
    expected = reference(tokenizer, texts)
    assert documents(out) == expected
    assert TokenFile(out).dtype == np.uint16
    assert result["lengths"]["total"] == sum(map(len, expected))
    assert result["dropped"] == {"empty": 1, "missing field": 1}
    rejects = [json.loads(line) for line in (tmp_path / "out.bin.rejects.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rejects] == [(4, "empty"), (9, "missing field")]
    TokenData([out], 16).check_tokenizer(tokenizer)
    assert not list(tmp_path.glob("*.partial*"))


def test_all_formats_give_the_same_bytes(tmp_path, texts, tokenizer_folder):
    for kind in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"):
        encode([make(tmp_path, kind, texts)], tmp_path / f"out{kind}.bin", tokenizer_folder, workers=1, batch_bytes=500)
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    encode([folder], tmp_path / "out.txt.bin", tokenizer_folder, workers=1)
    for suffix in ("bin", "idx"):
        contents = {path.read_bytes() for path in tmp_path.glob(f"*.{suffix}")}
        assert len(list(tmp_path.glob(f"*.{suffix}"))) == 5 and len(contents) == 1


def test_the_validation_split_depends_on_the_text_alone(tmp_path, rng, texts, tokenizer, tokenizer_folder):
    doubled = texts * 2
    rng.shuffle(doubled)
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in doubled])
    write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in texts])
    splits = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.bin"
        encode([tmp_path / f"{name}.jsonl"], out, tokenizer_folder, validation=0.3, workers=1, batch_bytes=500)
        splits.append([{tuple(d) for d in documents(p)} for p in (out, tmp_path / f"{name}.val.bin")])
    assert splits[0] == splits[1]
    train, validation = splits[0]
    assert not train & validation
    assert train | validation == {tuple(ids) for ids in reference(tokenizer, texts)}
    assert 1 <= len(validation) <= 40  # 60 texts: outside with a probability below 1e-7
    with pytest.raises(UserError, match=r"c\.val\.bin: none of the 120 documents falls to it with --validation 1e-12"):
        encode([tmp_path / "a.jsonl"], tmp_path / "c.bin", tokenizer_folder, validation=1e-12, workers=1)
    assert not list(tmp_path.glob("c.*"))


def test_a_large_vocabulary_takes_four_bytes_per_token(tmp_path, rng):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1").save_pretrained(tmp_path / "large")
    numbers = [[rng.randrange(70_000) for _ in range(9)] for _ in range(20)]
    write_jsonl(tmp_path / "a.jsonl", [{"text": " ".join(f"w{n}" for n in row)} for row in numbers])
    encode([tmp_path / "a.jsonl"], tmp_path / "out.bin", tmp_path / "large", workers=1)
    assert TokenFile(tmp_path / "out.bin").dtype == np.uint32
    assert documents(tmp_path / "out.bin") == [[*row, 1] for row in numbers]


def test_mistakes_are_user_errors(tmp_path, texts, tokenizer_folder):
    source = tmp_path / "a.jsonl"
    write_jsonl(source, [{"text": text} for text in texts])
    with pytest.raises(UserError, match=r"ends with \.bin"):
        encode([source], tmp_path / "out.npy", tokenizer_folder)
    with pytest.raises(UserError, match="less than 1"):
        encode([source], tmp_path / "out.bin", tokenizer_folder, validation=1.0)
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        encode([source], tmp_path / "out.bin", tmp_path)
    with pytest.raises(UserError, match="nothing to write: none of the 60 rows"):
        encode([source], tmp_path / "out.bin", tokenizer_folder, field="body", workers=1)
    encode([source], tmp_path / "out.bin", tokenizer_folder, workers=1)
    before = (tmp_path / "out.bin").read_bytes()
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tokenizer_folder)
    other.add_tokens(["naïve"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="from another tokenizer and vocab_size and tokenizer_hash"):
        encode([source], tmp_path / "out.bin", tmp_path / "other", workers=1)
    assert (tmp_path / "out.bin").read_bytes() == before


def test_a_tokenizer_without_an_end_of_text_token_is_refused(tmp_path, tokenizer_folder):
    from transformers import AutoTokenizer

    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no end-of-text token"):
        encode([tmp_path / "a.jsonl"], tmp_path / "out.bin", tmp_path / "bare")


def test_a_tokenizer_written_in_python(tmp_path, texts):
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not hasattr(tokenizer, "backend_tokenizer")
    tokenizer.save_pretrained(tmp_path / "bytes")
    texts = [*texts, "text that spells </s>"]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    encode([tmp_path / "a.jsonl"], tmp_path / "out.bin", tmp_path / "bytes", workers=2, batch_bytes=4000)
    assert documents(tmp_path / "out.bin") == [[byte + 3 for byte in text.encode()] + [1] for text in texts]


def test_a_validation_file_of_another_run_is_kept(tmp_path, texts, tokenizer_folder):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    (tmp_path / "out.val.bin").write_text("precious")
    with pytest.raises(UserError, match=r"out\.val\.bin: is there already"):
        encode([tmp_path / "a.jsonl"], tmp_path / "out.bin", tokenizer_folder, validation=0.3, workers=1)
    assert (tmp_path / "out.val.bin").read_text() == "precious"
