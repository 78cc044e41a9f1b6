"""Preference pairs as tokens: a chosen and a rejected answer to the same prompt, stored memory-mapped.

A row has `chosen` and `rejected`, each a list of messages or a text, with or without `prompt`
(`ds_llm.data.conversations.to_pair`). Two texts without a prompt are taken as they are, without a chat template: what
both begin with, up to a white space, is the prompt.

    CACHE/pairs-<key>/
        ids.npy, trained.npy   flat [tokens]: the sequences chosen 0, rejected 0, chosen 1, ...
        bounds.npy             int64 [2 pairs + 1]: sequence i is [bounds[i], bounds[i + 1])
        report.json            counts, reasons and the fingerprint of the arrays; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ds_llm.data import conversations, files, rows
from ds_llm.data.chat import Encoded, find_answers, tokenise
from ds_llm.data.conversations import RowError
from ds_llm.data.files import Batch
from ds_llm.data.workers import available_cpus, process
from ds_llm.errors import UserError
from ds_llm.progress import console

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100
VERSION = 1
NAMED = 5  # places named per reason
BYTES_PER_WORKER = 8 << 20  # less is not worth starting one
BATCH_BYTES = 1 << 18


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
        """The counts in one line, and one more per reason for which rows were dropped."""
        lost = sum(count for count, _ in self.dropped.values())
        lines = [
            f"{self.pairs:,} pairs of {self.rows:,} rows; {self.tokens:,} tokens, {self.answer_tokens:,} of them in "
            f"answers, longest sequence {self.longest:,}; {self.truncated:,} pairs truncated, {lost:,} rows dropped"
        ]
        for reason, (count, places) in sorted(self.dropped.items(), key=lambda item: -item[1][0]):
            lines.append(f"  dropped {count:,}: {reason} ({', '.join(places)}{', …' if count > len(places) else ''})")
        return "\n".join(lines)


class Pairs:
    """Stored pairs: `len()`, `pair(i)`, `batch(indices)`; `lengths` int64 [pairs, 2] in tokens, `report`, and
    `fingerprint`, the sha256 of the arrays."""

    def __init__(self, folder: Path, pad: int):
        self.folder, self.pad = folder, pad
        stored = json.loads((folder / "report.json").read_text())
        self.fingerprint = stored.pop("fingerprint")
        self.report = Report(**stored)
        mode = "r" if self.report.pairs else None  # nothing cannot be mapped
        self._ids, self._trained = (np.load(folder / f"{name}.npy", mmap_mode=mode) for name in ("ids", "trained"))
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


def prepare_pairs(
    sources: list[str], tokenizer, *, max_length: int, truncate: str = "right", cache: Path, name: str = "pairs"
) -> Pairs:
    """Read, encode and store the pairs of local files, folders or globs, or open them where that was done before.

    max_length: tokens of the longest sequence. A longer one is cut at its end if that leaves a token of the answer
    (truncate "right"); the pair is dropped otherwise, or always with "drop". One process of a machine builds, the
    others wait for it, so this is called before processes meet. Raises `UserError` when no pair is left.
    """
    from filelock import FileLock

    sources = files.find(sources)
    texts = json.dumps(
        {
            "version": VERSION,
            "files": [source.identity() for source in sources],
            "tokenizer": _tokenizer_identity(tokenizer),
            "max_length": max_length,
            "truncate": truncate,
        },
        sort_keys=True,
    )
    folder = Path(cache) / f"pairs-{hashlib.sha256(texts.encode()).hexdigest()[:32]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "report.json").is_file():
                _build(folder, sources, tokenizer, max_length, truncate, name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})", any_rank=True) from None
    pairs = Pairs(folder, tokenizer.pad_token_id)
    console.print(f"{name}: {pairs.report.describe()}", markup=False)
    if not len(pairs):
        names = ", ".join(str(source.path) for source in sources)
        raise UserError(f"{names}: no preference pair left to use; the counts above say why")
    return pairs


def _tokenizer_identity(tokenizer) -> list:
    from ds_llm.data.tokens import tokenizer_hash

    return [tokenizer_hash(tokenizer), tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.pad_token_id]


def _build(folder: Path, sources, tokenizer, max_length: int, truncate: str, name: str) -> None:
    scratch = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    report, bounds, digest = Report(), [0], hashlib.sha256()
    workers = min(available_cpus(), 1 + sum(source.size for source in sources) // BYTES_PER_WORKER)
    arguments = (tokenizer, max_length, truncate)
    title = f"{name}: encoding"
    with open(scratch / "ids", "wb") as ids_file, open(scratch / "trained", "wb") as trained_file:
        for path, results in process(title, sources, {}, _encoder, arguments, workers, BATCH_BYTES):
            for number, result in results:
                report.rows += 1
                if isinstance(result, str):
                    report.drop(result, f"{path}:{number}")
                    continue
                sequences, cut = result
                report.truncated += cut
                for ids, trained in sequences:
                    ids_file.write(ids.tobytes())
                    trained_file.write(trained.tobytes())
                    digest.update(ids.tobytes() + trained.tobytes())
                    bounds.append(bounds[-1] + len(ids))
                    report.answer_tokens += int(trained[1:].sum())
                    report.longest = max(report.longest, len(ids))
    report.pairs, report.tokens = len(bounds) // 2, bounds[-1]
    for array, dtype in (("ids", np.int32), ("trained", np.bool_)):
        flat = np.memmap(scratch / array, dtype, "r") if bounds[-1] else np.empty(0, dtype)
        np.save(scratch / f"{array}.npy", flat)
        del flat
        (scratch / array).unlink()
    np.save(scratch / "bounds.npy", np.array(bounds, np.int64))
    digest.update(np.array(bounds, np.int64).tobytes())
    stored = asdict(report) | {"fingerprint": digest.hexdigest()}
    (scratch / "report.json").write_text(json.dumps(stored, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)


def _encoder(tokenizer, max_length: int, truncate: str):
    """The worker's function: batch -> [(line, reason of a drop | (two sequences, whether one was cut))]."""

    def encode_batch(batch: Batch) -> list:
        results = []
        for item in rows.records(batch):
            if isinstance(item, rows.Reject):
                results.append((item.number, item.reason))
                continue
            number, row = item
            try:
                results.append((number, _encode_row(row, tokenizer, max_length, truncate)))
            except RowError as error:
                results.append((number, error.reason))
        return results

    return encode_batch


def _encode_row(row: dict, tokenizer, max_length: int, truncate: str):
    """Two (ids int32 [n], trained bool [n]) and whether one was cut; raises `RowError`."""
    sides, cut = encode_pair(row, tokenizer), False
    sequences = []
    for side in sides:
        ids, trained = np.array(side.input_ids, np.int32), np.array(side.trained)
        if len(ids) > max_length:
            if truncate == "drop":
                raise RowError("too long", f"{len(ids)} tokens")
            ids, trained, cut = ids[:max_length], trained[:max_length], True
        if not trained[1:].any():
            raise RowError("no answer within data.seq_len" if cut else "no answer token")
        sequences.append((ids, trained))
    if np.array_equal(sequences[0][0], sequences[1][0]):
        raise RowError("same answers" + (" once truncated" if cut else ""))
    return sequences, cut


def encode_pair(row: dict, tokenizer) -> tuple[Encoded, Encoded]:
    """The chosen and the rejected conversation of a row as tokens; trained are the answers behind the common beginning.

    Raises `RowError` when the row is not a pair or where its answers lie cannot be told.
    """
    if not row.get("prompt") and isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str):
        return _encode_texts(row["chosen"], row["rejected"], tokenizer)
    chosen, rejected, tools = conversations.to_pair(row)
    answered = sum(message["role"] == "assistant" for message in chosen[: _shared(chosen, rejected)])
    sides = []
    for messages in (chosen, rejected):
        text, spans = find_answers(tokenizer, messages, tools)
        if not spans[answered:]:
            raise RowError("no answer", "one side adds no message of the assistant to what both share")
        sides.append(tokenise(tokenizer, text, spans[answered:]))
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
