"""Log-probabilities of answers under the reference model: computed once, by all ranks, kept on disk.

CACHE/reference-<key>/
    key.json         what the key is the hash of: model, data, numbers of the forward pass
    log_probs.npy    float32 [samples, columns], as the mode defines them; -inf for samples that no run has needed yet
    part-00001.npy   what a rank knows while the pass is under way, the unknown -inf
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ds_llm.data.order import SampleOrder
from ds_llm.distributed.environment import rank, world_size
from ds_llm.errors import UserError
from ds_llm.progress import console, progress

FILE, SAVE_SECONDS = "log_probs.npy", 30.0
STOP_TURNS = 8  # forward passes between two looks for a request to stop
UNKNOWN = -math.inf


def reference_log_probs(
    forward: Callable[[dict[str, Tensor]], Tensor],
    samples,
    *,
    seed: int,
    batch_size: int,
    cache: Path,
    key: dict,
    needed: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    title: str = "reference log-probabilities",
) -> np.ndarray | None:
    """Log-probabilities in nats, summed over each answer's tokens: float32 [samples, columns], -inf where not needed.

    forward: a batch of `samples.scored` -> [B] of its rows; under ZeRO-3 it is a collective, so every rank calls it
        equally often.
    samples: see `ds_llm.train.alignment.Scored`.
    seed, batch_size: those of the training. The first epoch's micro-batches are scored as they will be trained on, so
        a policy that starts as the reference computes the same numbers.
    needed: only the samples at so many positions of the first epoch, for a run that ends before it; None: all.
    stop: a collective that says whether any rank was asked to stop; then what is known is kept and None returned.
    key: what the numbers depend on, as JSON: the model's fingerprint, that of the data, the type computed in.

    Every rank calls this and gets the same values. What an interrupted pass has computed is used, at any world size,
    and nothing is computed where all is known. The ranks exchange what they know once before the pass and once after.
    """
    text = json.dumps(key, indent=1, sort_keys=True)
    folder = Path(cache) / f"reference-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    shape = (len(samples), samples.columns)
    values = _exchange(_read(folder, shape))
    order = SampleOrder(len(samples), seed).permutation(0)
    last = len(order) if needed is None else min(needed, len(order))
    chunks = [order[i : i + batch_size] for i in range(0, last, batch_size)]
    missing = [chunk for chunk in chunks if not _known(values[chunk]).all()]
    _prepare_folder(folder, text)
    part = folder / f"part-{rank():05d}.npy"
    if missing:
        if not _pass(forward, samples, values, missing, part, stop, title):
            return None
        values = _exchange(values)
    else:
        console.print(f"{title}: all {sum(map(len, chunks)):,} samples found in {folder}")
    if unknown := int((~_known(values[np.concatenate(chunks)])).any(1).sum()):
        raise UserError(
            f"the reference model gives no finite log-probability for {unknown:,} of {len(samples):,} samples; is it "
            "sound, and train.dtype not too narrow for it?"
        )
    # one rank of a node, as nodes need not share a file system
    if os.environ.get("LOCAL_RANK", "0") == "0" and not np.array_equal(_load(folder / FILE, shape), values):
        _write(folder / FILE, values)
    if dist.is_initialized():
        dist.barrier()
    # every whole file is written: parts, also of an earlier pass on more ranks, have nothing to add
    for leftover in folder.glob("part-*.npy") if rank() == 0 else [part]:
        leftover.unlink(missing_ok=True)
    return values


def _pass(
    forward: Callable, samples, values: np.ndarray, missing: list, part: Path, stop: Callable, title: str
) -> bool:
    """Fill in this rank's share of the missing chunks, keep the values in `part`; False when it was stopped."""
    continued = f"{title} (continued)" if _known(values).any() else title
    saved, stopped = time.monotonic(), False
    with progress(continued, total=sum(map(len, missing)), unit="samples") as task:
        for start in range(0, len(missing), world_size()):
            turn = missing[start : start + world_size()]
            mine = turn[rank()] if rank() < len(turn) else turn[-1]  # a rank left over repeats one: equal calls
            parts = [forward(batch).detach().float() for batch in samples.scored(mine)]
            found = torch.cat(parts).view(samples.columns, -1).T.cpu().numpy()
            if rank() < len(turn):
                values[mine] = np.where(np.isfinite(found), found, UNKNOWN)
            task.advance(sum(map(len, turn)))
            if start // world_size() % STOP_TURNS == 0 and (stopped := stop()):
                break
            if time.monotonic() - saved > SAVE_SECONDS:
                _write(part, values)
                saved = time.monotonic()
    _write(part, values)
    return not stopped


def _known(values: np.ndarray) -> np.ndarray:
    return values != UNKNOWN


def _read(folder: Path, shape: tuple[int, int]) -> np.ndarray:
    """All that the files of a folder know."""
    values = _load(folder / FILE, shape)
    for path in sorted(folder.glob("part-*.npy")):
        values = np.maximum(values, _load(path, shape))
    return values


def _load(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The values in a file; unknown where it is not there or not whole."""
    unknown = np.full(shape, UNKNOWN, np.float32)
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError):
        return unknown
    return found if found.shape == unknown.shape and found.dtype == unknown.dtype else unknown


def _exchange(values: np.ndarray) -> np.ndarray:
    """What any rank knows; a maximum is exact and -inf its neutral element."""
    if not dist.is_initialized() or world_size() == 1:
        return values
    place = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.from_numpy(values).to(place)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.cpu().numpy()


def _prepare_folder(folder: Path, key: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "key.json", lambda file: file.write(key.encode()))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})", any_rank=True) from None


def _write(path: Path, values: np.ndarray) -> None:
    try:
        _replace(path, lambda file: np.save(file, values))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})", any_rank=True) from None


def _replace(path: Path, write: Callable) -> None:
    scratch = path.with_name(f".{path.name}.{rank()}")
    with open(scratch, "wb") as file:
        write(file)
    os.replace(scratch, path)
