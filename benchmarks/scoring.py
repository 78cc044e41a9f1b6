"""How fast is scoring, and how much memory does it take, beside the usual loops and beside the floor?

Documents are Wikipedia passages of BoolQ or texts of your own (`--texts`), every token after a document's first is
scored: entropy and log-probability. All contestants share one model in memory and take turns batch by batch, so that
they meet the same load; a figure is the median of the rounds, a ratio the median of each round's own. CPU seconds are
those of all threads.

ours         `ds_llm.scoring.forward.Scorer` on batches of documents of similar length
batch 1      transformers, one document at a time, all its logits
padded       transformers, padded batches in the data's order with an attention mask, all their logits
lm-eval      `loglikelihood` of the documents: no entropy
floor        backbone and output head's matrix product alone, on as many tokens in full rows; rows are so long that
             attention costs what the documents' own does
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ds_llm import cli
from ds_llm.errors import UserError

MIB = 1 << 20
CHUNK = 512  # rows of the floor's matrix product


class PeakMemory:
    """The most memory that a block takes beyond what is in use when it begins: of the GPU, or resident memory."""

    def __init__(self, cuda: bool):
        self.cuda, self.bytes = cuda, 0

    def __enter__(self):
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier block has freed counts for nobody
        self._over = threading.Event()
        self._before = self._highest = resident()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self._highest = max(self._highest, resident())

    def __exit__(self, *_) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
            self._highest = torch.cuda.max_memory_allocated()
        else:
            self._over.set()
            self._thread.join()
        self.bytes = self._highest - self._before


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def documents(count: int, tokenizer, seed: int, path: Path | None) -> list[np.ndarray]:
    """Token ids of texts drawn at random: of the rows `{"text"}` in `path`, or without one of BoolQ's passages."""
    if path is None:
        from ds_llm.data.corpora import boolq, cache_folder

        path = boolq(cache_folder() / "boolq")["boolq"]
    with open(path, encoding="utf-8") as file:
        texts = sorted({json.loads(line)["text"] for line in file})
    if len(texts) < count:
        raise UserError(f"{path}: {len(texts)} different texts, {count} are to be scored; lower --documents")
    chosen = np.random.default_rng(seed).choice(len(texts), count, replace=False)
    return [np.array(tokenizer(texts[i])["input_ids"]) for i in chosen]


def ours(scorer, ids: list[np.ndarray], budget: int) -> list[Callable]:
    """Batches of at most `budget` tokens, padding included, of documents of similar length."""
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    units = []
    while order:
        rows = max(1, budget // len(ids[order[0]]))
        units.append(partial(ours_batch, scorer, ids, order[:rows]))
        order = order[rows:]
    return units


def ours_batch(scorer, ids: list[np.ndarray], batch: list[int]) -> dict:
    from ds_llm.scoring.metrics import Sample

    rows = scorer.score([Sample(ids[i], np.ones(len(ids[i]), bool)) for i in batch])
    return {i: (row["entropy"], row["logprob"]) for i, row in zip(batch, rows, strict=True)}


def padded_batch(model, device, ids: list[np.ndarray], batch: Sequence[int]) -> dict:
    """Documents as a padded batch with an attention mask; one alone without."""
    import torch

    lengths = torch.tensor([len(ids[i]) for i in batch])
    tokens = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long)
    for row, i in zip(tokens, batch, strict=True):
        row[: len(ids[i])] = torch.from_numpy(ids[i])
    tokens = tokens.to(device)
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long().to(device) if len(batch) > 1 else None
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    log_p = logits[:, :-1].float().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).cpu().numpy()
    logprob = log_p.gather(-1, tokens[:, 1:, None])[..., 0].cpu().numpy()
    parts = [(row, slice(len(ids[i]) - 1)) for row, i in enumerate(batch)]
    return {i: (entropy[part].mean(), logprob[part].mean()) for i, part in zip(batch, parts, strict=True)}


def lm_eval_batch(harness, ids: list[np.ndarray], batch: Sequence[int]) -> dict:
    requests = [((None, None), ids[i][:1].tolist(), ids[i][1:].tolist()) for i in batch]
    answers = harness._loglikelihood_tokens(requests, disable_tqdm=True)
    return {i: (None, total / (len(ids[i]) - 1)) for i, (total, _) in zip(batch, answers, strict=True)}


def in_order(run: Callable, count: int, size: int) -> list[Callable]:
    """`run` on every `size` documents in the data's order."""
    return [partial(run, range(start, min(start + size, count))) for start in range(0, count, size)]


def floor(model, device, ids: list[np.ndarray], budget: int) -> list[Callable]:
    import torch

    lengths = np.array([len(i) for i in ids])
    width = round((lengths**2).sum() / lengths.sum())
    scored = 1 - len(ids) / lengths.sum()
    tokens = torch.from_numpy(np.concatenate(ids)).to(device)
    units = []
    for part in tokens.split(max(1, budget // width) * width):
        whole = len(part) // width * width
        rows = [part[:whole].view(-1, width), part[None, whole:]]
        units += [partial(floor_batch, model, row, scored) for row in rows if row.numel()]
    return units


def floor_batch(model, rows, scored: float) -> dict:
    from ds_llm.models.backbone import backbone

    weight = model.get_output_embeddings().weight
    hidden = backbone(model)(input_ids=rows, use_cache=False).last_hidden_state.flatten(0, 1)
    for chunk in hidden[: round(scored * len(hidden))].split(CHUNK):
        chunk @ weight.T
    return {}


def measure(units: dict[str, list[Callable]], model, cuda: bool) -> dict[str, dict]:
    """One round: every contestant's units, the one that is furthest behind goes next. The model is left as it was."""
    import torch

    state = {name: {"seconds": 0.0, "cpu_seconds": 0.0, "peak_bytes": 0, "scores": {}} for name in units}
    done = dict.fromkeys(units, 0)
    while behind := [name for name in units if done[name] < len(units[name])]:
        name = min(behind, key=lambda name: done[name] / len(units[name]))
        own = state[name]
        with PeakMemory(cuda) as memory:
            wall, cpu = time.perf_counter(), time.process_time()
            own["scores"] |= units[name][done[name]]()
            if cuda:
                torch.cuda.synchronize()
            own["seconds"] += time.perf_counter() - wall
            own["cpu_seconds"] += time.process_time() - cpu
        own["peak_bytes"] = max(own["peak_bytes"], memory.bytes)
        done[name] += 1
    return state


def disagreement(reference: dict, found: dict) -> float:
    """Largest relative difference of a score from the reference's."""
    pairs = [pair for i, row in found.items() for pair in zip(reference[i], row, strict=True) if pair[1] is not None]
    return max(abs(float(b) / float(a) - 1) for a, b in pairs)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="(default: SmolLM2-135M-Instruct)")
    parser.add_argument("--texts", type=Path, metavar="JSONL", help='rows {"text"} (default: passages, fetched)')
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="tokens of our batches (default 2048; on a GPU 16384)")
    parser.add_argument("--batch-size", type=int, default=8, help="documents of the other batches (default 8)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    import torch

    from benchmarks.machine import record, versions
    from ds_llm.data.corpora import smollm2
    from ds_llm.scoring.forward import Scorer

    cli.quiet()
    torch.set_grad_enabled(False)
    scorer = Scorer(args.model or smollm2()["smollm2"], ["entropy", "logprob"], dtype=args.dtype)
    cuda = scorer.device.type == "cuda"
    budget = args.tokens or (16384 if cuda else 2048)
    ids = documents(args.documents, scorer.tokenizer, args.seed, args.texts)
    tokens = sum(map(len, ids))
    model, device, count = scorer.model, scorer.device, len(ids)
    batches = {
        "ours": ours(scorer, ids, budget),
        "batch 1": in_order(partial(padded_batch, model, device, ids), count, 1),
        "padded": in_order(partial(padded_batch, model, device, ids), count, args.batch_size),
        "floor": floor(model, device, ids, budget),
    }
    if importlib.util.find_spec("lm_eval"):
        from lm_eval.models.huggingface import HFLM

        harness = HFLM(model, tokenizer=scorer.tokenizer, batch_size=args.batch_size)
        batches["lm-eval"] = in_order(partial(lm_eval_batch, harness, ids), count, args.batch_size)
    if cuda:
        for units in batches.values():
            units[0]()  # a first call compiles kernels and makes workspaces
    rounds = [measure(batches, model, cuda) for _ in range(args.rounds)]

    about = record()
    about["versions"] = versions(("torch", "triton", "transformers", "flash-attn", "lm-eval"))
    about |= {"documents": len(ids), "tokens": tokens, "tokens_per_batch": budget, "batch_size": args.batch_size}
    about |= {"dtype": args.dtype, "device": str(scorer.device), "rounds": args.rounds, "contestants": {}}
    for name in batches:
        runs = [one[name] for one in rounds]
        entry = {key: float(np.median([run[key] for run in runs])) for key in ("seconds", "cpu_seconds")}
        entry["tokens_per_second"] = tokens / entry["seconds"]
        entry["peak_mib"] = max(run["peak_bytes"] for run in runs) / MIB
        for key in ("seconds", "cpu_seconds"):
            speed = [one["floor"][key] / one[name][key] for one in rounds]
            entry[f"share_of_floor_{key}"] = float(np.median(speed))
        if name != "floor":
            entry["largest_relative_difference"] = disagreement(rounds[0]["batch 1"]["scores"], runs[0]["scores"])
        about["contestants"][name] = entry
    machine = about["machine"]
    print(f"{len(ids)} documents, {tokens:,} tokens, {args.dtype}, {machine['cpu']}, {machine['threads']} threads")
    heads = ("seconds", "tokens/s", "of floor", "CPU s", "of floor", "peak MiB", "differs")
    print(" " * 10 + "".join(f"{head:>10}" for head in heads))
    for name, e in about["contestants"].items():
        difference = f"{e['largest_relative_difference']:10.1e}" if name != "floor" else ""
        print(
            f"{name:10}{e['seconds']:10.2f}{e['tokens_per_second']:10.0f}{e['share_of_floor_seconds']:10.1%}"
            f"{e['cpu_seconds']:10.2f}{e['share_of_floor_cpu_seconds']:10.1%}{e['peak_mib']:10.0f}{difference}"
        )
    if "lm-eval" not in batches:
        print("lm-eval   not installed")
    if args.json:
        args.json.write_text(json.dumps(about, indent=2) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    cli.run(main)
