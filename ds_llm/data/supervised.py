"""Supervised samples: conversations and texts as tokens, with labels for the trained tokens.

Made once per data, tokenizer and options, in a folder of the cache:

| file | content |
| --- | --- |
| ids.bin | tokens of all samples, one after the other, little-endian uint16 or uint32 |
| trained.bin | one byte per token: 1 when it carries loss |
| boundaries.npy | int64 [samples + 1]: sample i is `ids[boundaries[i]:boundaries[i + 1]]` |
| supervised.npy | int64 [samples]: tokens of each that carry loss |
| report.json | counts |
| rejects.jsonl | the rows that gave no sample: `{"file", "line", "reason", "detail"}` |
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from ds_llm.data import chat, conversations, rows, statistics
from ds_llm.data.resumable import dump, write_atomically
from ds_llm.data.sources import Source, build_once, digests, resolve
from ds_llm.data.tokens import IGNORE, tokenizer_hash
from ds_llm.data.workers import available_cpus, ordered
from ds_llm.errors import UserError
from ds_llm.progress import console, progress

VERSION = 2  # of the stored form: raise it when the same input gives other bytes
FORMATS = ("messages", "prompt_completion", "alpaca", "text")
TRUNCATE = ("right", "drop")
REASONS = {
    **{name: rows.REASONS[name] for name in ("bad JSON", "not UTF-8", "too large")},
    **conversations.REASONS,
    **chat.REASONS,
    "too long": "more than max_length tokens, with truncate drop",
    "cut off": "nothing to train within the first max_length tokens",
    "nothing to train": "no answer with weight, or too short to predict a token",
}
FORMAT_ROWS = 100  # rows that tell the format of a source
PARALLEL_BYTES = 32 << 20  # less is done sooner in this process than worker processes start
MOST_WORKERS = 16  # each takes about 0.5 GB of memory


class Supervised:
    """Samples with labels, memory-mapped.

    report: `rows`, `samples`, `tokens`, `supervised_tokens`, `truncated`, `dropped` (count by reason), `rejects` (path
    of the list of dropped rows, or None), `sources` (the same for each, with `format`, `weight` and `drawn`), `lengths`
    (summary). `samples` and the tokens count what is drawn by the weights. fingerprint: sha256 (hex) of the data, the
    tokenizer, its template, the options, weights and seed. lengths: int64 [samples].
    """

    def __init__(self, folder: Path, weights: Sequence[float] | None = None, seed: int = 0):
        self.folder, self.weights, self.seed = Path(folder), weights, seed
        stored = json.loads((self.folder / "report.json").read_bytes())
        self._ids, self._trained = _open(self.folder / "ids.bin", stored["dtype"]), _open(self.folder / "trained.bin")
        self._boundaries = np.load(self.folder / "boundaries.npy")
        weights = [1.0] * len(stored["sources"]) if weights is None else [float(weight) for weight in weights]
        self._index = _mixture([source["samples"] for source in stored["sources"]], weights, seed)
        self.lengths = np.diff(self._boundaries)[self._index]
        identity = [stored["key"], weights, seed if any(weight % 1 for weight in weights) else 0]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self.report = self._report(stored, weights)

    def _report(self, stored: dict, weights: list[float]) -> dict:
        supervised = np.load(self.folder / "supervised.npy")[self._index]
        ends = np.cumsum([source["samples"] for source in stored["sources"]])
        drawn = np.bincount(np.searchsorted(ends, self._index, "right"), minlength=len(ends))
        sources = [
            {**source, "weight": weight, "drawn": int(count)}
            for source, weight, count in zip(stored["sources"], weights, drawn, strict=True)
        ]
        dropped: dict[str, int] = {}
        for source in sources:
            for reason, count in source["dropped"].items():
                dropped[reason] = dropped.get(reason, 0) + count
        return {
            "rows": sum(source["rows"] for source in sources),
            "samples": len(self),
            "tokens": int(self.lengths.sum()),
            "supervised_tokens": int(supervised.sum()),
            "truncated": sum(source["truncated"] for source in sources),
            "dropped": dropped,
            "rejects": str(self.folder / "rejects.jsonl") if dropped else None,
            "sources": sources,
            "lengths": statistics.summary(self.lengths),
        }

    def __len__(self) -> int:
        return len(self._index)

    def __reduce__(self):  # a pickled memory map would carry the whole file
        return Supervised, (self.folder, self.weights, self.seed)

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample i: input ids and labels, each int64 [length]; labels[t] is what position t predicts, or -100."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        start, end = self._boundaries[self._index[i] : self._index[i] + 2]
        ids = self._ids[start:end].astype(np.int64)
        labels = np.full_like(ids, IGNORE)
        labels[:-1] = np.where(self._trained[start + 1 : end], ids[1:], IGNORE)
        return ids, labels


def prepare(
    sources: Sequence[str | os.PathLike],
    tokenizer,
    *,
    max_length: int,
    format: str = "auto",
    train_on: str = "all",
    truncate: str = "right",
    weights: Sequence[float] | None = None,
    seed: int = 0,
    cache: str | os.PathLike,
) -> Supervised:
    """Supervised samples of the rows of `sources`, made once and kept under `cache`.

    sources: files, folders, globs, or data sets of the hub (see `ds_llm.data.sources`). tokenizer: of transformers.
    max_length: tokens of a sample at most; longer ones are cut behind that ("right"), or dropped (truncate "drop").
    format: one for all sources, or "auto" for what most of each source's first rows have. train_on: "all" answers, or
    the "last" one of each conversation. weights: one per source; weight w draws round(w * its samples) samples, by
    repetition and, for the fraction, a choice made by `seed`.

    Rows that give no sample are counted and listed. `UserError` when nothing at all would be trained. Call it before
    the process group opens: one process builds, the others wait for it at a file lock.
    """
    if max_length < 2:
        raise UserError(f"max_length {max_length}: must be at least 2, a token and the one that it predicts")
    for name, value, known in (
        ("format", format, ("auto", *FORMATS)),
        ("train_on", train_on, chat.TRAIN_ON),
        ("truncate", truncate, TRUNCATE),
    ):
        if value not in known:
            raise UserError(f"{name} {value}: unknown; known are {', '.join(known)}")
    names = list(sources)
    if weights is not None and len(weights) != len(names):
        raise UserError(f"{len(weights)} weights for {len(names)} data sources: give one for each")
    if weights is not None and not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"weights {list(weights)}: must be greater than 0")
    found, cache = resolve(names), Path(cache)
    formats = [find_format(source, FORMATS) if format == "auto" else format for source in found]
    if any(name != "text" for name in formats):
        chat.check_template(tokenizer)
    _say_columns(tokenizer, found, formats)
    options = {"max_length": max_length, "train_on": train_on, "truncate": truncate}
    key = _key(digests(found, cache), formats, tokenizer, options)
    folder = build_once(cache, key, lambda out: _build(out, key, found, formats, tokenizer, options))
    result = Supervised(folder, weights, seed)
    if not result.report["supervised_tokens"]:
        raise UserError(_nothing(names, folder, result.report))
    return result


def _say_columns(tokenizer, sources: list[Source], formats: list[str]) -> None:
    """Name the columns beside the messages that the chat template reads."""
    if not isinstance(tokenizer.chat_template, str):
        return
    seen = set()
    for source, format in zip(sources, formats, strict=True):
        if format != "text":
            seen |= {name for row in islice(source.rows(), FORMAT_ROWS) for name in conversations.columns(row)}
    if taken := sorted(chat.variables(tokenizer.chat_template) & seen):
        console.print(f"the chat template takes these columns of the rows: {', '.join(taken)}")


def find_format(source: Source, formats: Sequence[str]) -> str:
    """The format of most of a source's first rows. Raises `UserError` where it is not among `formats`."""
    first = list(islice(source.rows(), FORMAT_ROWS))
    names = Counter(filter(None, map(conversations.detect, first)))
    name = names.most_common(1)[0][0] if names else None
    if name in formats:
        return name
    if name:
        raise UserError(f"{source.name}: rows of the format {name}, which is not for this use; set the format")
    fields = f"the fields of the first row are {', '.join(map(str, first[0]))}" if first else "it holds no row"
    expected = ", ".join(" and ".join(conversations.FIELDS[name]) for name in formats)
    raise UserError(f"{source.name}: format not recognised ({fields}); a row needs {expected}")


def _key(contents: list[str], formats: list[str], tokenizer, options: dict) -> str:
    identity = {
        "version": VERSION,
        "contents": contents,
        "formats": formats,
        "tokenizer": tokenizer_hash(tokenizer),
        "template": tokenizer.chat_template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        **options,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def encoder(tokenizer, max_length: int, train_on: str, truncate: str) -> Callable:
    """The worker's function: (format, batch) -> (ids, trained, lengths, supervised, truncated, rows, [Reject])."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism

    def encode_row(row: dict, format: str) -> tuple[chat.Encoded, bool]:
        if format == "text":
            if not isinstance(row.get("text"), str):
                raise conversations.Malformed("wrong type" if row.get("text") is not None else "missing field", "text")
            if not row["text"].strip():
                raise conversations.Malformed("empty", "text")
            sample = chat.encode_text(tokenizer, row["text"])
        else:
            sample = chat.encode(tokenizer, *conversations.to_messages(row, format), train_on=train_on)
        length = len(sample.input_ids)
        if length > max_length and truncate == "drop":
            raise conversations.RowError("too long", f"{length:,} tokens")
        cut = chat.Encoded(sample.input_ids[:max_length], sample.trained[:max_length])
        if not any(cut.trained[1:]):
            raise conversations.RowError("cut off" if length > max_length else "nothing to train", f"{length:,} tokens")
        return cut, length > max_length

    def encode_batch(item: tuple[str, rows.Batch]):
        ids, trained, lengths, supervised, truncated, rejects, count = [], [], [], [], 0, [], 0
        for record in rows.records(item[1]):
            count += 1
            if isinstance(record, rows.Reject):
                rejects.append(record)
                continue
            try:
                sample, was_cut = encode_row(record[1], item[0])
            except conversations.RowError as error:
                rejects.append(rows.Reject(record[0], error.reason, error.detail))
                continue
            ids += sample.input_ids
            trained += sample.trained
            lengths.append(len(sample.input_ids))
            supervised.append(sum(sample.trained[1:]))
            truncated += was_cut
        return np.array(ids, np.uint32), np.array(trained, np.uint8), lengths, supervised, truncated, count, rejects

    return encode_batch


def _build(out: Path, key: str, sources: list[Source], formats: list[str], tokenizer, options: dict) -> None:
    dtype = "<u2" if max(tokenizer.get_vocab().values()) < 1 << 16 else "<u4"
    size = sum(source.size for source in sources)
    workers = min(available_cpus(), MOST_WORKERS) if size > PARALLEL_BYTES else 1
    lengths, supervised, reports = [], [], []
    origins: list[tuple[int, str]] = []

    def batches():
        for number, source in enumerate(sources):
            for file, batch in source.batches():
                origins.append((number, file))
                yield formats[number], batch

    for source, format in zip(sources, formats, strict=True):
        counts = {"rows": 0, "samples": 0, "tokens": 0, "supervised_tokens": 0, "truncated": 0, "dropped": {}}
        reports.append({"name": source.name, "format": format, **counts})
    with (
        open(out / "ids.bin", "wb") as ids_file,
        open(out / "trained.bin", "wb") as trained_file,
        open(out / "rejects.jsonl", "wb") as rejects_file,
        progress("encoding", size / 1e6, "MB") as task,
    ):
        done = ordered(encoder, (tokenizer, *options.values()), batches(), workers)
        for position, ((_, batch), result) in enumerate(done):
            ids, trained, sizes, learnt, truncated, count, rejects = result
            number, file = origins[position]
            report = reports[number]
            ids_file.write(ids.astype(dtype).tobytes())
            trained_file.write(trained.tobytes())
            lengths += sizes
            supervised += learnt
            for name, value in (("rows", count), ("samples", len(sizes)), ("tokens", sum(sizes))):
                report[name] += value
            report["supervised_tokens"] += sum(learnt)
            report["truncated"] += truncated
            statistics.write_rejects(rejects_file, file, rejects, report)
            task.advance(batch.disk / 1e6)
    np.save(out / "boundaries.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))
    np.save(out / "supervised.npy", np.array(supervised, np.int64))
    write_atomically(out / "report.json", dump({"key": key, "dtype": dtype, "sources": reports}))


def _mixture(counts: list[int], weights: list[float], seed: int) -> np.ndarray:
    """Numbers of the samples drawn, int64: of source k its first to last, round(weight * count) of them."""
    parts, start = [], 0
    for number, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        whole, rest = divmod(round(weight * count), count) if count else (0, 0)
        chosen = np.sort(np.random.default_rng([seed, number]).permutation(count)[:rest])
        parts += [start + np.tile(np.arange(count), whole), start + chosen]
        start += count
    return np.concatenate(parts).astype(np.int64)


def _open(path: Path, dtype: str = "u1") -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def _nothing(names: list, folder: Path, report: dict) -> str:
    """The reason why nothing would be trained."""
    where = ", ".join(map(str, names))
    if not report["rows"]:
        return f"{where}: holds no rows"
    if not report["dropped"]:
        return f"{where}: the weights draw none of the samples"
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in report["dropped"].items())
    example = next(source["example"] for source in report["sources"] if "example" in source)
    return f"{where}: no token to train in {report['rows']:,} rows ({reasons}); the first: {example}"
