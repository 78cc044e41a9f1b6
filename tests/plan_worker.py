"""One process of a training job that measures itself: rank 0 prints by how many bytes its resident memory grew.

Arguments: key=value of the run. The growth is from before the model is built to the most during the second step, in
anonymous pages: not those of libraries and of buffers that processes share.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

from ds_llm.config import run as run_config
from ds_llm.config.deepspeed import adopt
from ds_llm.engine import engine, processes
from ds_llm.memory.model import micro_batch, outline
from ds_llm.train.modes.pretrain import LanguageModeling

TINY = ["model.dim=32", "model.n_layers=1", "model.n_heads=2", "model.vocab_size=64", "model.max_seq_len=8"]
M_MMAP_THRESHOLD = -3  # of mallopt(3)


def resident() -> tuple[int, int]:
    """(anonymous bytes now, the most since the mark was cleared)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {name: int(status[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon", "RssFile", "RssShmem")}
    return sizes["RssAnon"], sizes["VmHWM"] - sizes["RssFile"] - sizes["RssShmem"]


def train(overrides: list[str]) -> tuple[engine.Engine, int]:
    """Two steps; returns the engine and the most bytes that were resident during the second."""
    config = run_config.load(None, overrides)
    adopt(config, 2)
    found = outline(config)
    model = found.make(found.config)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    running = engine.Engine(LanguageModeling(model), config)
    running.train()
    rows, length = micro_batch(config)
    positions = torch.arange(length).expand(rows, -1)
    for step in range(2):
        if step:
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
        for i in range(config.train.accumulation_steps):
            ids = torch.randint(config.model.vocab_size, (rows, length))
            running.begin_micro_step(last=i == config.train.accumulation_steps - 1)
            found = running.forward(input_ids=ids, labels=ids, position_ids=positions)
            running.backward(found.loss_sum / 1000 + found.aux_loss)
            del found
        running.step(1e-4)
    return running, resident()[1]


def main() -> None:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # so that freed tensors are no longer resident
    processes.init_distributed()
    first, _ = train([*sys.argv[1:], *TINY])  # what is allocated once, whatever the model
    first.destroy()
    del first
    gc.collect()
    before, _ = resident()
    running, peak = train(sys.argv[1:])
    if running.rank == 0:
        print(json.dumps({"growth": peak - before}), flush=True)


if __name__ == "__main__":
    main()
