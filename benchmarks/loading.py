"""How much memory and time does the start of a ZeRO-3 run take, and does it fit where whole models do not?

A bf16 model of the Llama family is made on the spot. Each contestant trains adapters of it for a step on so many
processes, as `launch/train.py` does (all of its weights would need 16 bytes each, which not every machine has):

parts   each rank reads its own part of every weight (`ds_llm.engine.weights`)
whole   each rank loads the whole model, and DeepSpeed takes the rank's part from that, as it does by itself

Until its model is loaded, a process may use its share of the weights, the largest layer, 1 GB and what it used before.
The kernel enforces that limit by a memory control group where the benchmark may make one; otherwise the table says so.
Peaks are of anonymous memory above what the process used before loading. "read" is how much of the mapped weight files
each process touched.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
GROUPS = Path("/sys/fs/cgroup")
SLACK = 1_000_000_000
SIZES = {  # layers, hidden size, inner size
    "1b": (18, 2048, 8192),
    "small": (12, 768, 3072),
}
VOCABULARY, TOKENS = 32_000, 4


def memory() -> dict[str, int]:
    """Resident bytes of this process: anonymous, and of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return {"anonymous": found["RssAnon"], "files": found["RssFile"]}


class Peak:
    """The most memory of each kind while the block runs, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.found, self._end = memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.005):
            self.found = {name: max(value, self.found[name]) for name, value in memory().items()}

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join()


class Limit:
    """A memory control group around this process; `enforced` says whether the kernel lets us make one."""

    def __init__(self, size: int):
        version_1 = GROUPS / "memory"
        parent, name = (version_1, "memory.limit_in_bytes") if version_1.is_dir() else (GROUPS, "memory.max")
        self._folder, self._parent, self.enforced = parent / f"loading-{os.getpid()}", parent, True
        try:
            self._before = _own_group(version_1.is_dir())
            self._folder.mkdir()
            (self._folder / name).write_text(str(size))
            (self._folder / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            self.enforced = False

    def lift(self) -> None:
        """Let the process use more again."""
        if self.enforced:
            (self._parent / self._before.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
            self._folder.rmdir()


def _own_group(version_1: bool) -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(",") if version_1 else controllers == "":
            return path
    raise OSError("no control group")


def make_model(folder: Path, size: str) -> dict[str, int]:
    """Write the model; returns bytes of its weights and of its largest layer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    layers, hidden, inner = SIZES[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, max_position_embeddings=TOKENS,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="1GB")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2").save_pretrained(folder)
    blocks = [*model.model.layers, model.model.embed_tokens]
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    return {"weights": 2 * sum(p.numel() for p in model.parameters()), "layer": 2 * largest}


def run_rank(folder: Path, way: str, limited: bool, sizes: dict[str, int]) -> None:
    """Load, train a step, and print what it took as a line of JSON."""
    from unittest import mock

    from ds_llm import cli

    cli.quiet()
    import torch
    import torch.distributed as dist

    from ds_llm.config import run as configuration
    from ds_llm.engine import engine as engines
    from ds_llm.engine import processes
    from ds_llm.pretrained.loading import load_model
    from ds_llm.train import start_model as starts
    from ds_llm.train.modes.pretrain import LanguageModeling

    keys = ["mode=sft", f"model.path={folder}", "zero=3", "train.dtype=bf16", "lora.enabled=true", "lora.r=4"]
    config = configuration.load(None, keys)
    processes.init_distributed()
    tokenizer, place = starts.load_tokenizer(folder), engines.place
    before, begun, done = memory(), time.perf_counter(), {}
    size = sizes["weights"] // dist.get_world_size() + sizes["layer"] + SLACK + before["anonymous"]
    limit = Limit(size) if limited else None

    def loaded() -> None:
        peak.__exit__()
        done["load_seconds"] = time.perf_counter() - begun
        if limit is not None:
            limit.lift()

    def place_and_note(module, settings) -> None:
        place(module, settings)
        loaded()

    if way == "whole":
        mock.patch.object(starts, "load_model", lambda *a, **k: load_model(*a, **k | {"deferred": False})).start()
        mock.patch.object(engines, "place", lambda module, settings: None).start()
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        partition = DeepSpeedZeRoOffload._convert_to_zero_parameters

        def partition_and_note(*args) -> None:
            partition(*args)
            loaded()

        mock.patch.object(DeepSpeedZeRoOffload, "_convert_to_zero_parameters", partition_and_note).start()
    else:
        mock.patch.object(engines, "place", place_and_note).start()
    peak = Peak().__enter__()
    engine = engines.Engine(LanguageModeling(starts.start_model(config, tokenizer)), config)
    ids = torch.arange(TOKENS)[None] + dist.get_rank()
    engine.train()
    engine.begin_micro_step(last=True)
    found = engine.forward(input_ids=ids, labels=ids.roll(-1, 1))
    engine.backward(found.loss_sum / TOKENS)
    engine.step(1e-4)
    report = {
        "load_peak": peak.found["anonymous"] - before["anonymous"],
        "read": peak.found["files"] - before["files"],
        "first_step_seconds": time.perf_counter() - begun,
        "loss": found.loss_sum.item(),
        "enforced": limit.enforced if limit is not None else False,
    }
    print(json.dumps(done | report), flush=True)
    dist.barrier()


def contest(folder: Path, way: str, ranks: int, limited: bool, sizes: dict[str, int]) -> list[dict] | None:
    """What each rank reports; None where the kernel ended one for its memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.loading", "--rank-of", str(folder), "--way", way]
    command += ["--limited"] * limited + ["--sizes", json.dumps(sizes)]
    jobs = []
    for rank in range(ranks):
        numbers = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_PORT": port,
        }
        env = os.environ | {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
        errors = subprocess.DEVNULL if way == "whole" and limited else None  # of ranks whose neighbour is ended
        jobs.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors, text=True))
    while any(job.poll() is None for job in jobs) and not any(job.poll() for job in jobs):
        time.sleep(0.1)
    if first := {job.poll() for job in jobs if job.poll()}:
        for job in jobs:
            job.kill()
        codes = [job.wait() for job in jobs]
        if not limited or not first & {-signal.SIGKILL}:
            raise SystemExit(f"{way} on {ranks} processes ended with {codes}")
        return None
    return [json.loads(job.communicate()[0].splitlines()[-1]) for job in jobs]


def row(way: str, ranks: int, limited: bool, sizes: dict[str, int], found: list[dict] | None) -> str:
    allowed = sizes["weights"] / ranks + sizes["layer"] + SLACK
    name = f"| {way} | {ranks} | {'yes' if limited else 'no'} | {allowed / 1e9:.2f} |"
    if found is None:
        return f"{name} killed | | | |"
    peak, read = (max(f[key] for f in found) / 1e9 for key in ("load_peak", "read"))
    seconds = [max(f[key] for f in found) for key in ("load_seconds", "first_step_seconds")]
    return f"{name} {peak:.2f} | {read:.2f} | {seconds[0]:.1f} | {seconds[1]:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", choices=SIZES, default="1b", help="the model: 1.2 billion parameters, or 0.13 billion"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of processes")
    parser.add_argument("--json", type=Path, help="also write the results as JSON")
    for name in ("--rank-of", "--way", "--sizes"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--limited", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        run_rank(Path(options.rank_of), options.way, options.limited, json.loads(options.sizes))
        return
    from benchmarks.machine import record

    results = []
    with tempfile.TemporaryDirectory() as place:
        sizes = make_model(Path(place), options.size)
        print(f"weights {sizes['weights'] / 1e9:.2f} GB, largest layer {sizes['layer'] / 1e9:.2f} GB; sizes in GB")
        print("| weights | processes | limited | allowed | peak | read | loaded after s | first step after s |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for ranks in options.ranks:
            for way, limited in (("parts", True), ("whole", True), ("whole", False)):
                if way == "whole" and not limited and ranks > min(options.ranks):
                    continue  # so many whole models may be more than this machine has
                found = contest(Path(place), way, ranks, limited, sizes)
                print(row(way, ranks, limited, sizes, found), flush=True)
                results.append({"way": way, "ranks": ranks, "limited": limited, "found": found})
    enforced = [f["enforced"] for result in results if result["limited"] for f in result["found"] or ()]
    if not all(enforced):
        print("the kernel enforced no limit here: no control group could be made")
    if options.json:
        options.json.write_text(json.dumps(record() | {"sizes": sizes, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
