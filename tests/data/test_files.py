import gzip
import io
import json

import pytest
import zstandard

from ds_llm.data.files import Position, find, read
from ds_llm.errors import UserError

from .conftest import write_jsonl


def names(files):
    return [file.path.name for file in files]


def test_folders_and_globs_are_sorted_and_each_file_comes_once(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.txt.zst", "sub/d.parquet", "e.json", "z.ndjson"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("notes.md", ".hidden.jsonl", "b.rejects.jsonl", "b.stats.json", "d.parquet.gz", "out.jsonl"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tokenizer" / name).write_bytes(b"x")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "b.jsonl")
    found = find([tmp_path], exclude=[tmp_path / "out.jsonl"])
    assert names(found) == ["a.jsonl.gz", "b.jsonl", "e.json", "c.txt.zst", "d.parquet", "z.ndjson"]
    assert names(find([tmp_path / "z.ndjson", tmp_path / "*.json*", tmp_path / "z.ndjson"])) == [
        "z.ndjson",
        "a.jsonl.gz",
        "b.jsonl",
        "e.json",
        "out.jsonl",
    ]
    assert names(find(f"{tmp_path}/**/*.txt*")) == names(find([f"{tmp_path}/**/*.txt*"])) == ["c.txt.zst"]


def test_inputs_that_cannot_be_read_are_user_errors(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    (tmp_path / "a.json").write_text('\n[{"text": "x"}]')
    (tmp_path / "a.parquet").write_text("not Parquet")
    for name, message in (
        ("absent.jsonl", "no such file"),
        ("*.parquet.x", "nothing to read"),
        ("empty", "nothing to read"),
        ("a.csv", "format not known"),
    ):
        with pytest.raises(UserError, match=message):
            find([tmp_path / name])
    with pytest.raises(UserError, match="no input"):
        find([])
    with pytest.raises(UserError, match="both an input and the output"):
        find([tmp_path / "a.jsonl"], exclude=[tmp_path / "a.jsonl"])
    with pytest.raises(UserError, match="JSON array"):
        list(read(find([tmp_path / "a.json"]), Position()))
    with pytest.raises(UserError, match="damaged"):
        list(read(find([tmp_path / "a.parquet"]), Position()))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_archive_is_named_with_its_last_good_record(tmp_path, rng, suffix):
    compress = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    first, second = (b"".join(b'{"text": "%d"}\n' % rng.getrandbits(64) for _ in range(20)) for _ in range(2))
    path = tmp_path / f"a.jsonl{suffix}"
    packed = compress(second)
    for damaged in (packed[: rng.randrange(1, len(packed))], b"garbage" + packed):
        path.write_bytes(compress(first) + damaged)
        seen = []
        with pytest.raises(UserError, match="damaged or cut short after record") as error:
            seen.extend(read(find([path]), Position(), 10))
        assert f"after record {len(seen)} " in str(error.value)


def make(tmp_path, kind, texts):
    """The texts as a file of one format; compressed ones in several members or frames."""
    path = tmp_path / f"data{kind}"
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    cut = len(lines) // 3
    if kind == ".jsonl":
        path.write_bytes(lines)
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines[:cut]) + gzip.compress(lines[cut:]))
    elif kind == ".jsonl.zst":
        pack = zstandard.ZstdCompressor().compress
        path.write_bytes(pack(lines[:cut]) + pack(lines[cut:]))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": texts, "n": list(range(len(texts)))}), path, row_group_size=7)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_reading_goes_on_from_any_batch(tmp_path, texts, rng, kind):
    write_jsonl(tmp_path / "first.jsonl", [{"text": "before"}])
    (tmp_path / "last.txt").write_text("behind")
    files = find([tmp_path / "first.jsonl", make(tmp_path, kind, texts), tmp_path / "last.txt"])
    batches = list(read(files, Position(), rng.choice([1, 100, 1000])))
    assert sum(batch.disk for batch in batches) == sum(file.size for file in files)

    def records(chosen):
        out = []
        for batch in chosen:
            if batch.kind == "parquet":
                import pyarrow as pa

                rows = pa.ipc.open_stream(io.BytesIO(batch.data)).read_all().to_pylist()
                out += [(batch.file, batch.first + i, row["text"]) for i, row in enumerate(rows)]
            else:
                out += [(batch.file, batch.first + i, line) for i, line in enumerate(batch.data.splitlines())]
        return out

    everything = records(batches)
    assert len(everything) == len(texts) + 2
    assert [number for file, number, _ in everything if file == 1] == list(range(1, len(texts) + 1))
    for chosen in rng.sample(range(len(batches)), 3):
        rest = list(read(files, batches[chosen].after, rng.choice([1, 77])))
        assert records(batches[: chosen + 1]) + records(rest) == everything
