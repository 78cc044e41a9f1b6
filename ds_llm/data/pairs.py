"""Preference pairs as tokens: a chosen and a rejected answer to the same prompt, stored memory-mapped.

A row has `chosen` and `rejected`, each a list of messages or a text, with or without `prompt`
(`ds_llm.data.conversations.to_pair`). Two texts without a prompt are taken as they are, without a chat template: what
both begin with, up to a white space, is the prompt.

Made once per data, tokenizer and options, in a folder of the cache:

| file | content |
| --- | --- |
| ids.bin | int32 tokens of the sequences chosen 0, rejected 0, chosen 1, ... one after the other |
| trained.bin | one byte per token: 1 when it belongs to an answer |
| bounds.npy | int64 [2 pairs + 1]: sequence i is `ids[bounds[i]:bounds[i + 1]]` |
| report.json | counts, and the sha256 of the three |
| rejects.jsonl | the rows that gave no pair: `{"file", "line", "reason", "detail"}` |
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

from ds_llm.data import conversations, rows, statistics
from ds_llm.data.chat import Encoded, find_answers, tokenise
from ds_llm.data.conversations import RowError
from ds_llm.data.files import Batch
from ds_llm.data.resumable import dump, write_atomically
from ds_llm.data.sources import Source, build_once, digests, resolve
from ds_llm.data.workers import available_cpus, ordered
from ds_llm.errors import UserError
from ds_llm.progress import console, progress

if TYPE_CHECKING:
    import torch

VERSION = 1  # of the stored form: raise it when the same input gives other bytes
IGNORE_INDEX = -100
NAMED = 5  # places named per reason
REJECTS = "rejects.jsonl"
BYTES_PER_WORKER = 8 << 20  # less is not worth starting one
MOST_WORKERS = 16  # each takes about 0.5 GB of memory


class Pair(NamedTuple):
    """Two sequences: input_ids int64 [n], labels int64 [n] already shifted (-100 where nothing is learned)."""

    chosen: tuple[np.ndarray, np.ndarray]
    rejected: tuple[np.ndarray, np.ndarray]


@dataclass
class Report:
    """What became of the rows. `dropped`: reason -> [count, the first few places FILE:LINE]."""

    rows: int = 0
    pairs: int = 0
    tokens: int = 0
    answer_tokens: int = 0  # of both answers: those whose log-probability counts
    truncated: int = 0  # pairs of which an answer lost its end
    longest: int = 0
    dropped: dict[str, list] = field(default_factory=dict)

    def drop(self, reason: str, place: str) -> None:
        entry = self.dropped.setdefault(reason, [0, []])
        entry[0] += 1
        if len(entry[1]) < NAMED:
            entry[1].append(place)

    def describe(self) -> str:
        """The counts in one line."""
        lost = sum(count for count, _ in self.dropped.values())
        return (
            f"{self.pairs:,} pairs of {self.rows:,} rows; {self.tokens:,} tokens, {self.answer_tokens:,} of them in "
            f"answers, longest sequence {self.longest:,}; {self.truncated:,} pairs truncated, {lost:,} rows dropped"
            + (f": {self.reasons()}" if lost else "")
        )

    def reasons(self) -> str:
        """Why rows were dropped, the most frequent reason first, with the first places."""
        if not self.rows:
            return "the input holds no rows"
        parts = []
        for reason, (count, places) in sorted(self.dropped.items(), key=lambda item: -item[1][0]):
            parts.append(f"{count:,} {reason} ({', '.join(places)}{', …' if count > len(places) else ''})")
        return "; ".join(parts)


class Pairs:
    """Stored pairs: `len()`, `pair(i)`, `batch(indices)`; `lengths` int64 [pairs, 2] in tokens, `report`, and
    `fingerprint`, the sha256 of the arrays."""

    def __init__(self, folder: Path, pad: int):
        self.folder, self.pad = folder, pad
        stored = json.loads((folder / "report.json").read_text())
        self.fingerprint = stored.pop("fingerprint")
        self.report = Report(**stored)
        self._ids, self._trained = _open(folder / "ids.bin", np.int32), _open(folder / "trained.bin", np.bool_)
        self._bounds = np.load(folder / "bounds.npy")
        self.lengths = np.diff(self._bounds).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.lengths)

    def pair(self, i: int) -> Pair:
        return Pair(self._sequence(2 * i), self._sequence(2 * i + 1))

    def _sequence(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self._bounds[i], self._bounds[i + 1])
        ids = self._ids[part].astype(np.int64)
        labels = np.full(len(ids), IGNORE_INDEX, np.int64)
        labels[:-1] = np.where(self._trained[part][1:], ids[1:], IGNORE_INDEX)
        return ids, labels

    def batch(self, indices) -> dict[str, torch.Tensor]:
        """P pairs as 2P padded rows, chosen answers first: `input_ids`, `labels`, `attention_mask` [2P, S] int64 and
        `index` [P], the numbers of the pairs."""
        import torch  # not at the top: the processes that encode have no use for it

        indices = np.asarray(indices, np.int64)
        pairs = [self.pair(int(i)) for i in indices]
        sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        # the last token of a sequence predicts nothing, so it is left out
        shape = (len(sequences), max(len(ids) for ids, _ in sequences) - 1)
        input_ids, labels = np.full(shape, self.pad), np.full(shape, IGNORE_INDEX)
        mask = np.zeros(shape, np.int64)
        for row, (ids, wanted) in enumerate(sequences):
            length = len(ids) - 1
            input_ids[row, :length], labels[row, :length], mask[row, :length] = ids[:-1], wanted[:-1], 1
        arrays = {"input_ids": input_ids, "labels": labels, "attention_mask": mask, "index": indices}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _open(path: Path, dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def prepare_pairs(
    sources: Sequence[str | os.PathLike],
    tokenizer,
    *,
    max_length: int,
    truncate: str = "right",
    cache: str | os.PathLike,
    name: str = "pairs",
) -> Pairs:
    """The pairs of files, folders, globs or data sets of the hub, made once and kept under `cache`.

    max_length: tokens of the longest sequence. A longer one is cut at its end if that leaves a token of the answer
    (truncate "right"); the pair is dropped otherwise, or always with "drop". Call it before the process group opens:
    one process builds, the others wait for it. Raises `UserError` when no pair is left.
    """
    from ds_llm.data.tokens import tokenizer_hash

    found, cache = resolve(sources), Path(cache)
    identity = {
        "version": VERSION,
        "contents": digests(found, cache),
        "tokenizer": tokenizer_hash(tokenizer),
        "template": tokenizer.chat_template,
        "special": {key: str(token) for key, token in tokenizer.special_tokens_map.items()},
        "max_length": max_length,
        "truncate": truncate,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    arguments = (tokenizer, max_length, truncate)
    folder = build_once(cache, f"pairs-{key}", lambda out: _build(out, found, arguments, f"encoding {name}"))
    pairs = Pairs(folder, tokenizer.pad_token_id)
    console.print(f"{name}: {pairs.report.describe()}", markup=False)
    if pairs.report.dropped:
        console.print(f"dropped rows with file, line and reason: {folder / REJECTS}", markup=False)
    if not len(pairs):
        raise UserError(f"{', '.join(map(str, sources))}: no preference pair to train on; {pairs.report.reasons()}")
    return pairs


def _build(out: Path, sources: list[Source], arguments: tuple, title: str) -> None:
    report, state, bounds, digest, origins = Report(), {"dropped": {}}, [0], hashlib.sha256(), []
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
                report.truncated += cut
                for ids, trained in sequences:
                    ids_file.write(ids.tobytes())
                    trained_file.write(trained.tobytes())
                    digest.update(ids.tobytes() + trained.tobytes())
                    bounds.append(bounds[-1] + len(ids))
                    report.answer_tokens += int(trained[1:].sum())
                    report.longest = max(report.longest, len(ids))
            task.advance(batch.disk / 1e6)
    report.pairs, report.tokens = len(bounds) // 2, bounds[-1]
    np.save(out / "bounds.npy", np.array(bounds, np.int64))
    digest.update(np.array(bounds, np.int64).tobytes())
    write_atomically(out / "report.json", dump(asdict(report) | {"fingerprint": digest.hexdigest()}))


def _encoder(tokenizer, max_length: int, truncate: str) -> Callable:
    """The worker's function: batch -> per row a Reject, or (two sequences, whether one was cut)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism

    def encode_batch(batch: Batch) -> list:
        results = []
        for item in rows.records(batch):
            if not isinstance(item, rows.Reject):
                try:
                    item = _encode_row(item[1], tokenizer, max_length, truncate)
                except RowError as error:
                    item = rows.Reject(item[0], error.reason, error.detail)
            results.append(item)
        return results

    return encode_batch


def _encode_row(row: dict, tokenizer, max_length: int, truncate: str):
    """Two (ids int32 [n], trained bool [n]) and whether one was cut; raises `RowError`."""
    sequences, cut = [], False
    for side in encode_pair(row, tokenizer):
        ids, trained = np.array(side.input_ids, np.int32), np.array(side.trained, bool)
        length = len(ids)
        if length > max_length:
            if truncate == "drop":
                raise RowError("too long", f"{length:,} tokens")
            ids, trained, cut = ids[:max_length], trained[:max_length], True
        if not trained[1:].any():
            raise RowError("cut off" if length > max_length else "nothing to train", f"{length:,} tokens")
        sequences.append((ids, trained))
    if np.array_equal(sequences[0][0], sequences[1][0]):
        raise RowError("same answers", "the first data.seq_len tokens" if cut else "their tokens")
    return sequences, cut


def encode_pair(row: dict, tokenizer) -> tuple[Encoded, Encoded]:
    """The chosen and the rejected conversation of a row as tokens; trained are the answers behind the common beginning.

    Raises `RowError` when the row is not a pair or where its answers lie cannot be told.
    """
    if not row.get("prompt") and isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str):
        return _encode_texts(row["chosen"], row["rejected"], tokenizer)
    chosen, rejected, tools = conversations.to_pair(row)
    shared = _shared(chosen, rejected)
    sides = []
    for messages in (chosen, rejected):
        text, spans = find_answers(tokenizer, messages, tools)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        own = [s for s, i in zip(spans, answers, strict=True) if i >= shared and messages[i].get("weight", 1)]
        if not own:
            raise RowError("no answer", "one side adds no message of the assistant to what both share")
        sides.append(tokenise(tokenizer, text, own))
    return sides[0], sides[1]


def _shared(one, other) -> int:
    """How many items two sequences have in common from the front."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _encode_texts(chosen: str, rejected: str, tokenizer) -> tuple[Encoded, Encoded]:
    """Two plain texts; the end-of-text token behind each is part of the answer."""
    if chosen == rejected:
        raise RowError("same answers")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token to put behind a text; set its eos_token")
    shared = chosen[: _shared(chosen, rejected)]
    # back to the end of a word, so that the tokens of the prompt are those of the prompt alone
    shared = shared[: max((i for i, c in enumerate(shared) if c.isspace()), default=0)].rstrip()
    sides = []
    for text in (chosen, rejected):
        prompt = tokenizer(shared, split_special_tokens=True, verbose=False)["input_ids"]
        if prompt and prompt[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
            prompt = prompt[:-1]
        rest = text[len(shared) :]
        answer = tokenizer(rest, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        sides.append(Encoded(prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    return sides[0], sides[1]
