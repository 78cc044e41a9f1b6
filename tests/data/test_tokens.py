import json
import pickle

import numpy as np
import pytest

from ds_llm.data.tokens import IGNORE, TokenData, TokenFile, TokenWriter, index_path, token_dtype
from ds_llm.errors import UserError

HASH = "ab" * 32


def write(path, documents, vocab_size=500, **options):
    """Documents (each ending with its eos) as a token file, in several appends."""
    with TokenWriter(path, vocab_size=vocab_size, eos_token_id=0, tokenizer_hash=HASH, **options) as writer:
        for start in range(0, len(documents), 3):
            part = documents[start : start + 3]
            writer.append(np.concatenate(part), np.array([len(d) for d in part]))
    return path


def random_documents(rng, count, top=500):
    return [np.array([rng.randrange(1, top) for _ in range(rng.randint(0, 12))] + [0]) for _ in range(count)]


@pytest.mark.parametrize("vocab_size, dtype", [(500, "uint16"), (1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_round_trip_with_boundaries_and_the_dtype_of_the_vocabulary(tmp_path, rng, vocab_size, dtype):
    documents = random_documents(rng, 20, vocab_size)
    file = TokenFile(write(tmp_path / "a.bin", documents, vocab_size))
    assert file.tokens.dtype == token_dtype(vocab_size) == np.dtype(dtype)
    assert len(file) == sum(map(len, documents))
    assert len(file.boundaries) == 21
    for i, document in enumerate(documents):
        assert file.tokens[file.boundaries[i] : file.boundaries[i + 1]].tolist() == document.tolist()
    file.verify()
    assert pickle.loads(pickle.dumps(file)).tokens.tolist() == file.tokens.tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("isolate", [True, False])
def test_samples_equal_a_loop_over_the_tokens(tmp_path, rng, isolate):
    parts = [random_documents(rng, 30), random_documents(rng, 17)]
    paths = [write(tmp_path / f"{i}.bin", part) for i, part in enumerate(parts)]
    size = rng.randint(2, 9)
    data = TokenData(paths, size, isolate_documents=isolate)
    expected = []
    for part in parts:
        tokens = np.concatenate(part).tolist()
        starts = set(np.cumsum([len(d) for d in part]).tolist()) | {0}
        for begin in range(0, (len(tokens) - 1) // size * size, size):
            inputs, labels, positions = [], [], []
            for t in range(begin, begin + size):
                inputs.append(tokens[t])
                labels.append(IGNORE if isolate and t + 1 in starts else tokens[t + 1])
                restart = isolate and t in starts
                positions.append(0 if restart or not positions else positions[-1] + 1)
            expected.append((inputs, labels, positions))
    assert len(data) == len(expected)
    assert [tuple(x.tolist() for x in data.sample(i)) for i in range(len(data))] == expected
    batch = data.batch([1, 0])
    assert batch["labels"].tolist() == [expected[1][1], expected[0][1]]
    assert [s.tolist() for s in data.streams()] == [np.concatenate(part).tolist() for part in parts]
    assert data.dropped_tokens == data.total_tokens - len(expected) * size


def test_an_interrupted_writer_continues_from_what_it_saved(tmp_path, rng):
    documents = random_documents(rng, 9)
    whole = write(tmp_path / "whole.bin", documents)
    options = {"vocab_size": 500, "eos_token_id": 0, "tokenizer_hash": HASH}
    first = TokenWriter(tmp_path / "cut.bin", **options)
    first.append(np.concatenate(documents[:4]), np.array([len(d) for d in documents[:4]]))
    state = first.save()
    first.append(np.array([7, 7, 0]), np.array([3]))  # after the save: must not survive
    for file in first.files:
        file.close()
    with TokenWriter(tmp_path / "cut.bin", **options, state=state) as second:
        second.append(np.concatenate(documents[4:]), np.array([len(d) for d in documents[4:]]))
    assert (tmp_path / "cut.bin").read_bytes() == whole.read_bytes()
    assert (tmp_path / "cut.idx").read_bytes() == index_path(whole).read_bytes()


def test_an_exception_leaves_nothing(tmp_path):
    with (
        pytest.raises(RuntimeError),
        TokenWriter(tmp_path / "a.bin", vocab_size=9, eos_token_id=0, tokenizer_hash=HASH) as w,
    ):
        w.append(np.array([1, 0]), np.array([2]))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_unusable_files_are_user_errors(tmp_path, rng):
    good = write(tmp_path / "good.bin", random_documents(rng, 10))
    other = write(tmp_path / "other.bin", random_documents(rng, 10), vocab_size=600)
    with pytest.raises(UserError, match="vocab_size"):
        TokenData([good, other], 2)
    with pytest.raises(UserError, match="no such token file"):
        TokenFile(tmp_path / "absent.bin")
    with pytest.raises(UserError, match="not one sample"):
        TokenData([good], 10_000)

    with open(other, "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(UserError, match="truncated or was replaced"):
        TokenFile(other)

    flipped = bytearray(good.read_bytes())
    flipped[0] ^= 1
    good.write_bytes(flipped)
    with pytest.raises(UserError, match="checksum"):
        TokenFile(good).verify()

    index_path(good).write_bytes(b'{"format": "something else"}\n')
    with pytest.raises(UserError, match="not the index"):
        TokenFile(good)
    index_path(good).unlink()
    with pytest.raises(UserError, match=r"index good\.idx is missing"):
        TokenFile(good)


def test_another_tokenizer_is_refused(tmp_path, tokenizer_folder, rng):
    from transformers import AutoTokenizer

    from ds_llm.data.tokens import tokenizer_hash

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    path = tmp_path / "a.bin"
    with TokenWriter(
        path, vocab_size=400, eos_token_id=2, tokenizer_hash=tokenizer_hash(tokenizer), tokenizer=str(tokenizer_folder)
    ) as writer:
        writer.append(np.array([5, 6, 2]), np.array([3]))
    data = TokenData([path], 2)
    assert data.files[0].tokenizer_path == str(tokenizer_folder)
    data.check_tokenizer(tokenizer)
    data.check_tokenizer(str(tokenizer_folder))
    tokenizer.chat_template = "another"  # changes no id
    data.check_tokenizer(tokenizer)
    tokenizer.add_tokens(["zzz"])
    with pytest.raises(UserError, match="made with another tokenizer"):
        data.check_tokenizer(tokenizer)


def test_the_index_is_readable_without_this_library(tmp_path, rng):
    documents = random_documents(rng, 5)
    raw = index_path(write(tmp_path / "a.bin", documents)).read_bytes()
    header, _, body = raw.partition(b"\n")
    assert (len(header) + 1) % 8 == 0
    assert json.loads(header)["documents"] == 5
    assert np.frombuffer(body, "<i8").tolist() == [0, *np.cumsum([len(d) for d in documents]).tolist()]
