"""A tiny corpus with known structure, and jobs that run the real launch scripts in real processes.

A test waits for what a job does, not for a time: on a busy machine everything takes several times as long.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forked
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
VOCAB = 61
FORKED = {"forked": 2, "forked-1": 1, "forked-4": 4}  # processes
PATIENCE = 900  # seconds for what takes one or some tens of them on a quiet machine: ends what hangs, decides nothing
TRACKED = ["tracking.log_every=1", "tracking.report=false", "tracking.tensorboard=false"]  # every step, nothing else


def environment(**extra: str) -> dict:
    # of the tests' process and its group of one; a script sets for itself what it needs
    own = {"TRITON_INTERPRET", "MKL_CBWR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"}
    own |= {"MASTER_ADDR", "MASTER_PORT"}
    inherited = {k: v for k, v in os.environ.items() if k not in own}
    return inherited | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **extra}


def command(launcher: str, arguments: list[str], script: Path = ROOT / "launch" / "train.py") -> list[str]:
    """`deepspeed` and `torchrun` start 2 processes, `python` one."""
    bin_folder = Path(sys.executable).parent
    prefix = {
        "python": [sys.executable],
        "deepspeed": [str(bin_folder / "deepspeed"), "--num_gpus", "2", "--master_port", str(_free_port())],
        "torchrun": [str(bin_folder / "torchrun"), "--standalone", "--nproc_per_node", "2"],
    }[launcher]
    return [*prefix, str(script), *arguments]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(launcher: str, arguments: list[str], timeout: float = PATIENCE, **kwargs) -> subprocess.CompletedProcess:
    """Run `launch/train.py` to its end; nothing of the job survives a timeout, no shared memory its end."""
    job = start(launcher, arguments, **kwargs)
    try:
        out, err = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        out, err = job.communicate()
        pytest.fail(f"the job hung\n{out[-3000:]}\n{err[-3000:]}")
    if launcher == "deepspeed":  # its port names the buffers
        assert not list(Path("/dev/shm").glob(f"deepspeed_*_{job.args[job.args.index('--master_port') + 1]}_*"))
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def start(
    launcher: str, arguments: list[str], script: Path = ROOT / "launch" / "train.py", **env
) -> subprocess.Popen | forked.Job:
    """Start a job with its own process group. `forked` starts 2 processes, `forked-1` one and `forked-4` four, without
    the cost of a launcher and of imports, see `forked`."""
    if launcher in FORKED:
        return forked.Job(FORKED[launcher], [str(script), *arguments], environment(**env))
    return subprocess.Popen(
        command(launcher, arguments, script),
        env=environment(**env),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def until(condition: Callable[[], bool], job: subprocess.Popen | forked.Job) -> None:
    """Wait for what a running job does; a job that ends without it fails the test."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if job.poll() is not None or time.monotonic() > end:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
            pytest.fail("it never came to that\n" + "\n".join(text[-3000:] for text in job.communicate()))
        time.sleep(0.01)


# The loop of a process, which stands still from its n-th piece of work on until somebody says so or asks it to stop
HOLD = """
import time
from pathlib import Path
from {module} import {name}

work, begun = {name}.{method}, []

def held(self, *given):
    begun.append(time.monotonic())
    while len(begun) > {count} and not Path({go!r}).exists():
        if (stop := getattr(self, "interrupt", None)) is not None and stop.requested():
            break
        time.sleep(0.01)
    return work(self, *given)

{name}.{method} = held
"""


def hold(folder: Path, what: str, count: int) -> dict[str, str]:
    """Environment of a job that stands still after `count` steps of training (`what`: step) or batches of scoring
    (score) until `folder`/go exists: a test can meet it there however slow either of them is."""
    module, name, method = {
        "step": ("ds_llm.train.trainer", "Trainer", "_step"),
        "score": ("ds_llm.scoring.forward", "Scorer", "score"),
    }[what]
    extension = folder / f"hold_{what}_{count}.py"
    extension.write_text(HOLD.format(module=module, name=name, method=method, count=count, go=str(folder / "go")))
    return {"DS_LLM_EXTENSIONS": str(extension)}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Folder with `tokenizer/`, `train.bin`, `val.bin`: documents of 1 to 40 tokens that count upwards modulo 57."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from ds_llm.data.tokens import TokenWriter, tokenizer_hash

    folder = tmp_path_factory.mktemp("corpus")
    words = ["<pad>", "<bos>", "<eos>", "<unk>"] + [f"w{i}" for i in range(VOCAB - 4)]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {f"{n}_token": f"<{n}>" for n in ("pad", "bos", "eos", "unk")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.save_pretrained(folder / "tokenizer")
    random = np.random.default_rng(0)
    for name, documents in (("train", 400), ("val", 40)):
        with TokenWriter(
            folder / f"{name}.bin",
            vocab_size=VOCAB,
            eos_token_id=2,
            tokenizer_hash=tokenizer_hash(tokenizer),
            tokenizer=str(folder / "tokenizer"),
        ) as writer:
            for _ in range(documents):
                length = random.integers(1, 41)
                text = 4 + (random.integers(57) + np.arange(length) * random.integers(1, 3)) % 57
                writer.append(np.append(text, 2), np.array([length + 1]))
    return folder


@pytest.fixture
def tiny(corpus) -> list[str]:
    """Overrides of a run that takes seconds."""
    return [
        f"data.train={corpus / 'train.bin'}",
        f"data.val={corpus / 'val.bin'}",
        "model.dim=32",
        "model.n_layers=2",
        "model.n_heads=4",
        "model.n_kv_heads=2",
        "model.max_seq_len=32",
        "train.batch_size=4",
        "train.dtype=fp32",
        "optim.lr=1e-3",
        *TRACKED,
    ]
