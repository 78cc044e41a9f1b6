"""Token files: `NAME.bin` holds the tokens, `NAME.idx` the bounds of documents and the tokenizer.

`NAME.bin` is a flat array of little-endian uint16 (vocabularies up to 65,536) or uint32; each document is followed by
the end-of-text token. `NAME.idx` is one line of JSON (the fields of `TokenFile.meta`), padded with blanks to a multiple
of 8 bytes, then `documents + 1` little-endian int64 numbers: document i is `tokens[boundaries[i]:boundaries[i + 1]]`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from ds_llm.data.resumable import AppendFile, beside, partial
from ds_llm.errors import UserError
from ds_llm.progress import console

FORMAT, VERSION = "ds_llm.tokens", 1
IGNORE = -100  # label that carries no loss
COPY_BYTES = 1 << 22


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every token id of a vocabulary."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def tokenizer_hash(tokenizer) -> str:
    """sha256 (hex) of all parts of a tokenizer that decide the ids of a text.

    These are vocabulary, merges, added tokens, normaliser and pre-tokeniser; chat template, truncation, padding and
    special-token templates do not count. tokenizer: of transformers, or a folder or name for `AutoTokenizer`.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        from ds_llm.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        content = json.loads(backend.to_str())
        content = {name: content.get(name) for name in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def index_path(path: str | os.PathLike) -> Path:
    """`NAME.idx` beside `NAME.bin`."""
    return Path(path).with_suffix(".idx")


class TokenWriter:
    """Writes a token file document by document; it appears under its name only when `close` has finished.

    As a context manager it closes on success and removes the unfinished files on an exception. state: from `save` of an
    interrupted writer, whose unfinished files are continued.
    """

    def __init__(
        self,
        path,
        *,
        vocab_size: int,
        eos_token_id: int,
        tokenizer_hash: str,
        tokenizer: str | None = None,
        state: dict | None = None,
    ):
        self.path, self.dtype = Path(path), token_dtype(vocab_size)
        if self.path.suffix != ".bin":
            raise UserError(f"{path}: a token file's name ends with .bin")
        self.meta = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype.name,
            "vocab_size": vocab_size,
            "eos_token_id": eos_token_id,
            "tokenizer_hash": tokenizer_hash,
            "tokenizer": tokenizer,
        }
        if tokenizer and os.path.isdir(tokenizer):
            self.meta["tokenizer"] = os.path.abspath(tokenizer)
            self.meta["tokenizer_relative"] = os.path.relpath(tokenizer, self.path.parent)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.token_count, self.documents = (state["tokens"], state["documents"]) if state else (0, 0)
        boundaries = beside(self.path, ".boundaries")
        self.files = [
            AppendFile(self.path, self.token_count * self.dtype.itemsize),
            AppendFile(boundaries, 8 * (self.documents + 1) if state else 0),
        ]
        self._bin, self._boundaries = self.files
        if not state:
            self._boundaries.write(np.zeros(1, "<i8").tobytes())
        self._sha = hashlib.sha256()
        with open(self._bin.path, "rb") as written:
            while part := written.read(COPY_BYTES):
                self._sha.update(part)

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents: their tokens one after the other, each with its end-of-text token, and their lengths."""
        tokens = np.ascontiguousarray(tokens, self.dtype)
        boundaries = self.token_count + np.cumsum(lengths, dtype="<i8")
        if len(lengths) and boundaries[-1] != self.token_count + len(tokens):
            raise ValueError(f"lengths sum to {boundaries[-1] - self.token_count}, not to the {len(tokens)} tokens")
        self._bin.write(tokens)
        self._sha.update(tokens)
        self._boundaries.write(boundaries.tobytes())
        self.token_count += len(tokens)
        self.documents += len(lengths)

    def save(self) -> dict:
        """Flush the appended tokens to the disk. Returns the state from which a writer can continue."""
        for file in self.files:
            file.save()
        return {"tokens": self.token_count, "documents": self.documents}

    def lengths(self) -> np.ndarray:
        """Tokens of each document with its end-of-text token, int64 [documents]."""
        self._boundaries.save()
        return np.diff(np.fromfile(self._boundaries.path, "<i8"))

    def seal(self) -> None:
        """Write the index, still as a partial file, and close. The caller renames the files."""
        self.save()
        self.meta |= {"tokens": self.token_count, "documents": self.documents, "sha256": self._sha.hexdigest()}
        header = json.dumps(self.meta, sort_keys=True).encode()
        header += b" " * (-(len(header) + 1) % 8) + b"\n"
        for file in self.files:
            file.close()
        with open(partial(index_path(self.path)), "wb") as out, open(self._boundaries.path, "rb") as body:
            out.write(header)
            shutil.copyfileobj(body, out, COPY_BYTES)
            out.flush()
            os.fsync(out.fileno())

    def close(self) -> None:
        """Rename both files to their final names, the index last: a `.bin` without `.idx` is unfinished."""
        self.seal()
        index = index_path(self.path)
        index.unlink(missing_ok=True)
        os.replace(self._bin.path, self.path)
        os.replace(partial(index), index)
        self._boundaries.path.unlink()

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        if kind is None:
            self.close()
            return
        for file in self.files:
            file.close()
            file.path.unlink(missing_ok=True)


class TokenFile:
    """A token file, memory-mapped.

    Attributes: `tokens` [tokens] uint16 or uint32; `boundaries` [documents + 1] int64; `meta`, the index's first line.
    A missing, empty, truncated or foreign file is a `UserError`.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        index = index_path(self.path)
        if self.path.is_dir():
            raise UserError(f"{path}: is a folder; name the token files (.bin) in it")
        if not self.path.is_file():
            raise UserError(f"{path}: no such token file; make one with launch/prepare.py tokens")
        if self.path == index or not index.is_file():
            raise UserError(f"{path}: its index {index.name} is missing; run launch/prepare.py tokens again")
        with open(index, "rb") as file:
            header = file.readline(1 << 20)
        try:
            self.meta = json.loads(header)
            if self.meta["format"] != FORMAT:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{index}: not the index of a token file") from None
        if self.meta["version"] != VERSION:
            raise UserError(
                f"{index}: format version {self.meta['version']}, this program reads version {VERSION}; "
                "run launch/prepare.py tokens again"
            )
        self.dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        count, documents = self.meta["tokens"], self.meta["documents"]
        for name, found, expected in (
            (self.path, self.path.stat().st_size, count * self.dtype.itemsize),
            (index, index.stat().st_size, len(header) + 8 * (documents + 1)),
        ):
            if found != expected:
                raise UserError(
                    f"{name}: {found:,} bytes where the index records {expected:,}; the file is truncated or was "
                    "replaced, run launch/prepare.py tokens again"
                )
        if count == 0:
            raise UserError(f"{path}: holds no tokens; check what launch/prepare.py tokens was given")
        self.tokens = np.memmap(self.path, self.dtype, "r", shape=(count,))
        self.boundaries = np.memmap(index, "<i8", "r", offset=len(header), shape=(documents + 1,))
        if self.boundaries[0] != 0 or self.boundaries[-1] != count:
            raise UserError(f"{index}: the last document ends at {self.boundaries[-1]:,} of {count:,} tokens")

    def __len__(self) -> int:
        return self.meta["tokens"]

    def __reduce__(self):  # a pickled memory map would carry the whole file
        return TokenFile, (self.path,)

    @property
    def tokenizer_path(self) -> str | None:
        """Folder or hub name of the file's tokenizer: its folder relative to the file, or its path at that time."""
        relative = self.meta.get("tokenizer_relative")
        if relative and (self.path.parent / relative).is_dir():
            return os.path.normpath(self.path.parent / relative)
        return self.meta["tokenizer"]

    def check_tokenizer(self, tokenizer) -> None:
        """Raise `UserError` unless `tokenizer` (a tokenizer, its folder, or its hash) is the one that made the file."""
        is_hash = isinstance(tokenizer, str) and re.fullmatch("[0-9a-f]{64}", tokenizer)
        found = tokenizer if is_hash else tokenizer_hash(tokenizer)
        if found != self.meta["tokenizer_hash"]:
            raise UserError(
                f"{self.path}: made with another tokenizer (hash {self.meta['tokenizer_hash'][:12]}, "
                f"from {self.meta['tokenizer'] or 'an unrecorded place'}) than the one given (hash {found[:12]})"
            )

    def check_untouched(self) -> None:
        """Raise `UserError` where the tokens changed after their index was written.

        A file that is older than its index counts as unchanged.
        """
        if self.path.stat().st_mtime_ns > index_path(self.path).stat().st_mtime_ns:
            console.print(f"{self.path}: is newer than its index; comparing its checksum")
            self.verify()

    def check_ids(self, tokens: np.ndarray, start: int) -> None:
        """Raise `UserError` when one of the `tokens`, which begin at token `start`, is outside the vocabulary."""
        if len(tokens) and tokens.max() >= self.meta["vocab_size"]:
            place = start + int(tokens.argmax())
            raise UserError(
                f"{self.path}: damaged: token {place:,} is {tokens.max()}, outside the vocabulary of "
                f"{self.meta['vocab_size']:,}; run launch/prepare.py tokens again",
                any_rank=True,
            )

    def verify(self) -> None:
        """Read the whole file. Raises `UserError` where checksum, boundaries or token ids do not match the index."""
        digest = hashlib.sha256()
        for start in range(0, len(self.tokens), COPY_BYTES):
            part = np.asarray(self.tokens[start : start + COPY_BYTES])
            digest.update(part)
            self.check_ids(part, start)
        if digest.hexdigest() != self.meta["sha256"]:
            raise UserError(f"{self.path}: checksum differs from the index; run launch/prepare.py tokens again")
        if (np.diff(self.boundaries) < 1).any():
            raise UserError(f"{index_path(self.path)}: document boundaries do not increase")


class TokenData:
    """Training samples of `seq_len` tokens from token files, in file order.

    Sample k of a file covers `tokens[k * seq_len : (k + 1) * seq_len]` and predicts the token after each; the rest
    shorter than a sample is left out (`dropped_tokens`). Files must share dtype, vocabulary and tokenizer.

    isolate_documents: positions restart at 0 after each document, and the end-of-text token is not asked to predict
    the next document's first token. Otherwise positions run from 0 to seq_len - 1 and every label counts.
    """

    def __init__(self, paths, seq_len: int, isolate_documents: bool = True):
        paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not paths:
            raise UserError("no token file given")
        self.seq_len, self.isolate_documents = seq_len, isolate_documents
        self.files = [TokenFile(path) for path in paths]
        first = self.files[0]
        for file in self.files[1:]:
            for name in ("dtype", "vocab_size", "tokenizer_hash"):
                if file.meta[name] != first.meta[name]:
                    raise UserError(
                        f"{file.path}: {name} {file.meta[name]} differs from {first.path}'s {first.meta[name]}"
                    )
        self.counts = [max(0, (len(file) - 1) // seq_len) for file in self.files]  # samples of each file
        self._ends = np.cumsum(self.counts)
        self.meta = first.meta
        self.total_tokens = sum(len(file) for file in self.files)
        self.dropped_tokens = self.total_tokens - len(self) * seq_len
        if not len(self):
            names = ", ".join(str(file.path) for file in self.files)
            raise UserError(
                f"{names}: {self.total_tokens:,} tokens are not one sample of seq_len {seq_len} + 1; "
                "add data or shorten data.seq_len"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def check_tokenizer(self, tokenizer) -> None:
        """Raise `UserError` unless every file was made with `tokenizer`."""
        for file in self.files:
            file.check_tokenizer(tokenizer)

    def streams(self) -> list[np.memmap]:
        """The tokens of each file, memory-mapped, end-of-text tokens included."""
        return [file.tokens for file in self.files]

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sample i: input ids, labels and position ids, each int64 [seq_len]; labels[t] is the token after input t."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        which = int(np.searchsorted(self._ends, i, "right"))
        file, size = self.files[which], self.seq_len
        start = (i - int(self._ends[which - 1] if which else 0)) * size
        tokens = file.tokens[start : start + size + 1].astype(np.int64)
        file.check_ids(tokens, start)
        inputs, labels, positions = tokens[:-1], tokens[1:].copy(), np.arange(size)
        if self.isolate_documents:
            low, high = np.searchsorted(file.boundaries, (start + 1, start + size + 1))
            ends = file.boundaries[low:high] - start  # where in the sample a new document begins, 1..seq_len
            labels[ends - 1] = IGNORE
            starts = np.zeros(size, np.int64)
            starts[ends[ends < size]] = ends[ends < size]
            positions -= np.maximum.accumulate(starts)
        return inputs, labels, positions

    def batch(self, indices) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels`, `position_ids`, each int64 [len(indices), seq_len]; labels are shifted already."""
        columns = zip(*(self.sample(int(i)) for i in indices), strict=True)
        names = ("input_ids", "labels", "position_ids")
        return {name: torch.from_numpy(np.stack(column)) for name, column in zip(names, columns, strict=True)}
