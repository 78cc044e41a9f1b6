"""Answers to prompts as tokens, each marked as desirable or not. DPO and KTO train on them.

They are built once per data, tokenizer and options, in a folder of the cache, and read memory-mapped:

| file | content |
| --- | --- |
| ids.bin | int32 tokens of all sequences, one after the other; a sequence is a prompt with its answer |
| trained.bin | one byte per token: 1 if it belongs to the answer |
| bounds.npy | int64 [sequences + 1]: sequence i is `ids[bounds[i]:bounds[i + 1]]` |
| desirable.npy | bool [sequences] |
| report.json | counts, and one sha256 over ids, trained and bounds |
| rejects.jsonl | the rows that cannot be used: `{"file", "line", "reason", "detail"}` |
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ds_llm.data import rows, statistics
from ds_llm.data.chat import Encoded
from ds_llm.data.conversations import RowError
from ds_llm.data.files import Batch
from ds_llm.data.resumable import dump, write_atomically
from ds_llm.data.sources import Source, build_once, digests, resolve
from ds_llm.data.workers import available_cpus, ordered
from ds_llm.errors import UserError
from ds_llm.progress import console, progress

if TYPE_CHECKING:
    import torch

VERSION = 3  # of the stored form: raise it when the same input gives other bytes
IGNORE_INDEX = -100
NAMED = 5  # places named per reason
REJECTS = "rejects.jsonl"
BYTES_PER_WORKER = 8 << 20  # less is not worth starting one
MOST_WORKERS = 16  # each takes about 0.5 GB of memory


class Answer(NamedTuple):
    """A prompt with one answer. desirable: whether the model shall learn to give it."""

    encoded: Encoded
    desirable: bool


# a row -> its answers, all of them or none; raises `RowError`
Encoder = Callable[[dict, object], Sequence[Answer]]


@dataclass
class Report:
    """Counts of the rows. `dropped`: reason -> [count, the first places as FILE:LINE]."""

    rows: int = 0
    used: int = 0  # rows of which no answer was dropped
    desirable: int = 0
    undesirable: int = 0
    tokens: int = 0
    answer_tokens: int = 0  # those whose log-probability counts
    truncated: int = 0  # rows of which an answer lost its end
    longest: int = 0
    dropped: dict[str, list] = field(default_factory=dict)

    def drop(self, reason: str, place: str) -> None:
        entry = self.dropped.setdefault(reason, [0, []])
        entry[0] += 1
        if len(entry[1]) < NAMED:
            entry[1].append(place)

    def describe(self, what: str) -> str:
        """The counts in one line. It begins with `what`, such as "5 pairs"."""
        lost = sum(count for count, _ in self.dropped.values())
        return (
            f"{what} of {self.rows:,} rows; {self.tokens:,} tokens, {self.answer_tokens:,} of them in answers, longest "
            f"sequence {self.longest:,}; {self.truncated:,} truncated, {lost:,} rows dropped"
            + (f": {self.reasons()}" if lost else "")
        )

    def reasons(self) -> str:
        """Why rows were dropped: the reasons by falling count, each with its first places."""
        if not self.rows:
            return "the input holds no rows"
        parts = []
        for reason, (count, places) in sorted(self.dropped.items(), key=lambda item: -item[1][0]):
            parts.append(f"{count:,} {reason} ({', '.join(places)}{', …' if count > len(places) else ''})")
        return "; ".join(parts)


class Answers:
    """Answers that `prepare` has stored.

    `lengths` int64 [sequences] are in tokens, `desirable` is bool [sequences]. `fingerprint` is the sha256 of ids,
    trained and bounds: equal fingerprints have equal log-probabilities under one model.
    """

    def __init__(self, folder: Path, pad: int):
        self.folder, self.pad = folder, pad
        stored = json.loads((folder / "report.json").read_text())
        self.fingerprint = stored.pop("fingerprint")
        self.report = Report(**stored)
        self._ids, self._trained = _open(folder / "ids.bin", np.int32), _open(folder / "trained.bin", np.bool_)
        self._bounds, self.desirable = np.load(folder / "bounds.npy"), np.load(folder / "desirable.npy")
        self.lengths = np.diff(self._bounds)

    def describe(self) -> str:
        """The counts of the rows in one line."""
        report = self.report
        total = report.desirable + report.undesirable
        return report.describe(f"{total:,} answers ({report.desirable:,} desirable, {report.undesirable:,} not)")

    def sequence(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Input ids int64 [n] and labels int64 [n], already shifted (-100 where nothing is learned)."""
        return with_labels(*self.tokens(i))

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Input ids int32 [n], and for each whether it belongs to the answer, bool [n]."""
        part = slice(self._bounds[i], self._bounds[i + 1])
        return self._ids[part], self._trained[part]

    def padded(self, sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        """Sequences as padded rows: `input_ids`, `labels`, `attention_mask` [B, S] int64."""
        import torch  # not at the top: the processes that encode have no use for it

        # the last token of a sequence predicts nothing, so it is left out
        shape = (len(sequences), max(len(ids) for ids, _ in sequences) - 1)
        input_ids, labels = np.full(shape, self.pad), np.full(shape, IGNORE_INDEX)
        mask = np.zeros(shape, np.int64)
        for row, (ids, wanted) in enumerate(sequences):
            length = len(ids) - 1
            input_ids[row, :length], labels[row, :length], mask[row, :length] = ids[:-1], wanted[:-1], 1
        arrays = {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def with_labels(ids: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Input ids int64 [n] and labels int64 [n]. A label is the next id if that is trained, else -100."""
    ids = ids.astype(np.int64)
    labels = np.full(len(ids), IGNORE_INDEX, np.int64)
    labels[:-1] = np.where(trained[1:], ids[1:], IGNORE_INDEX)
    return ids, labels


def _open(path: Path, dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def prepare(
    sources: Sequence[str | os.PathLike],
    tokenizer,
    encode: Encoder,
    *,
    kind: str,
    max_length: int,
    truncate: str,
    cache: str | os.PathLike,
    name: str,
) -> Path:
    """Encode the rows of files, folders, globs or hub data sets, and return the folder of the answers.

    The folder is kept under `cache`, and the same data, tokenizer and options find it again. Call this before the
    process group opens: one process builds, the others wait.

    encode: turns a row into its answers, in worker processes. kind: names the format that `encode` gives, and the
    folder. max_length: most tokens of a sequence. With truncate "right" a longer sequence loses its end, if a token of
    the answer remains. Otherwise its row is dropped, and with "drop" every such row is.
    """
    from ds_llm.data.tokens import tokenizer_hash

    found, cache = resolve(sources), Path(cache)
    identity = {
        "version": VERSION,
        "kind": kind,
        "contents": digests(found, cache),
        "tokenizer": tokenizer_hash(tokenizer),
        "template": tokenizer.chat_template,
        "special": {key: str(token) for key, token in tokenizer.special_tokens_map.items()},
        "max_length": max_length,
        "truncate": truncate,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    arguments = (encode, tokenizer, max_length, truncate)
    return build_once(cache, f"{kind}-{key}", lambda out: _build(out, found, arguments, f"encoding {name}"))


def announce(answers: Answers, kind: str, name: str, sources: Sequence[str | os.PathLike]) -> None:
    """Print the counts of the stored answers in a line. Raises `UserError` if no row could be used."""
    report = answers.report
    console.print(f"{name}: {answers.describe()}")
    if report.dropped:
        console.print(f"dropped rows with file, line and reason: {answers.folder / REJECTS}")
    if not report.used:
        raise UserError(f"{', '.join(map(str, sources))}: no {kind} to train on; {report.reasons()}")


def _build(out: Path, sources: list[Source], arguments: tuple, title: str) -> None:
    report, state, bounds, digest, origins = Report(), {"dropped": {}}, [0], hashlib.sha256(), []
    desirable: list[bool] = []
    size = sum(source.size for source in sources)
    workers = min(available_cpus(), MOST_WORKERS, 1 + size // BYTES_PER_WORKER)

    def batches():
        for source in sources:
            for file, batch in source.batches():
                origins.append(file)
                yield batch

    with (
        open(out / "ids.bin", "wb") as ids_file,
        open(out / "trained.bin", "wb") as trained_file,
        open(out / REJECTS, "wb") as rejects_file,
        progress(title, size / 1e6, "MB") as task,
    ):
        for position, (batch, results) in enumerate(ordered(_encoder, arguments, batches(), workers)):
            report.rows += len(results)
            rejects = [result for result in results if isinstance(result, rows.Reject)]
            statistics.write_rejects(rejects_file, origins[position], rejects, state)
            for reject in rejects:
                report.drop(reject.reason, f"{Path(origins[position]).name}:{reject.number}")
            for sequences, cut in (result for result in results if not isinstance(result, rows.Reject)):
                report.used += 1
                report.truncated += cut
                for ids, trained, wanted in sequences:
                    ids_file.write(ids.tobytes())
                    trained_file.write(trained.tobytes())
                    digest.update(ids.tobytes() + trained.tobytes())
                    bounds.append(bounds[-1] + len(ids))
                    desirable.append(wanted)
                    report.answer_tokens += int(trained[1:].sum())
                    report.longest = max(report.longest, len(ids))
            task.advance(batch.disk / 1e6)
    report.tokens, report.desirable = bounds[-1], sum(desirable)
    report.undesirable = len(desirable) - report.desirable
    np.save(out / "bounds.npy", np.array(bounds, np.int64))
    np.save(out / "desirable.npy", np.array(desirable, bool))
    digest.update(np.array(bounds, np.int64).tobytes())
    write_atomically(out / "report.json", dump(asdict(report) | {"fingerprint": digest.hexdigest()}))


def _encoder(encode: Encoder, tokenizer, max_length: int, truncate: str) -> Callable:
    """The function of a worker: for each row of a batch a `Reject`, or its sequences and whether one was cut."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism

    def encode_batch(batch: Batch) -> list:
        results = []
        for item in rows.records(batch):
            if not isinstance(item, rows.Reject):
                try:
                    item = _encode_row(encode(item[1], tokenizer), max_length, truncate)
                except RowError as error:
                    item = rows.Reject(item[0], error.reason, error.detail)
            results.append(item)
        return results

    return encode_batch


def _encode_row(answers: Sequence[Answer], max_length: int, truncate: str):
    """The row's sequences [(ids int32 [n], trained bool [n], desirable)], and whether one was cut; raises RowError."""
    sequences, cut = [], False
    for answer in answers:
        ids, trained = np.array(answer.encoded.input_ids, np.int32), np.array(answer.encoded.trained, bool)
        length = len(ids)
        if length > max_length:
            if truncate == "drop":
                raise RowError("too long", f"{length:,} tokens")
            ids, trained, cut = ids[:max_length], trained[:max_length], True
        if not trained[1:].any():
            raise RowError("cut off" if length > max_length else "nothing to train", f"{length:,} tokens")
        sequences.append((ids, trained, answer.desirable))
    # a pair
    if len(sequences) == 2 and np.array_equal(sequences[0][0], sequences[1][0]):
        raise RowError("same answers", "the first data.seq_len tokens" if cut else "their tokens")
    return sequences, cut
