"""The frame of every launch script: one line for a user's mistake, quiet libraries, exit codes."""

from __future__ import annotations

import importlib.util
import logging
import os
import select
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from ds_llm.compat import versions
from ds_llm.distributed import interrupt, launchers
from ds_llm.distributed.environment import rank, world_size
from ds_llm.distributed.watchdog import LOST_PEER
from ds_llm.errors import UserError, first_line, say

# For so long another rank waits for rank 0 to print an error: a launcher ends rank 0 as soon as another rank exits. If
# it is not ended by then, either only this rank has the error or the launcher ends no ranks.
FIRST_RANK_SECONDS = 10.0


def quiet() -> None:
    """Silence start-up messages of libraries unless DS_LLM_VERBOSE=1. Call it before importing them."""
    if _verbose():
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore")
    for name in ("torch.distributed", "torch.utils.cpp_extension", "transformers", "matplotlib", "fsspec", "numexpr"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its level itself when it is imported, which accelerate does too
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    if rank() or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars; read when tqdm is imported


def _verbose() -> bool:
    return os.environ.get("DS_LLM_VERBOSE") == "1"


def _reader_gone() -> bool:
    """Whether the reader of our output has closed it, as `| head` does, which is no error."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def import_extensions() -> None:
    """Run the Python files that DS_LLM_EXTENSIONS names, which may register metrics and losses.

    Several names are separated as in PATH. Raises `UserError` for a file that cannot be run.
    """
    for name in filter(None, os.environ.get("DS_LLM_EXTENSIONS", "").split(os.pathsep)):
        try:
            spec = importlib.util.spec_from_file_location(f"ds_llm_extension_{Path(name).stem}", name)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the file raises
            reason = first_line(error)
            raise UserError(f"DS_LLM_EXTENSIONS: {name} cannot be run: {reason}") from error


def _ended_for_rank_0() -> bool:
    """Wait for rank 0 to print an error that all ranks have. Returns whether the launcher ends this process."""
    end = time.monotonic() + FIRST_RANK_SECONDS
    while not interrupt.received and time.monotonic() < end:
        time.sleep(0.05)
    return interrupt.received


def run(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its result.

    A `UserError` becomes one line on standard error and its exit code; where all ranks raise it, only rank 0 prints it.
    """
    try:
        launchers.adopt()
        quiet()
        if not rank():
            versions.warn_untested()
        import_extensions()
        code = main() or 0
    except UserError as error:
        if not rank() or error.any_rank or error.said or not _ended_for_rank_0():
            say(error)
        code = error.exit_code
    except RuntimeError as error:  # torch's own distributed errors are such
        if world_size() == 1 or not any(words in str(error) for words in LOST_PEER) or _verbose():
            raise
        print(
            f"error: rank {rank()}: another process of the job is gone or unreachable; its own message says why, none "
            "means that it was killed (out of memory?). The same command continues from the last checkpoint "
            "(DS_LLM_VERBOSE=1 shows the traceback)",
            file=sys.stderr,
            flush=True,
        )
        code = 1
    except BrokenPipeError:
        if not _reader_gone():  # another pipe, of a process that we work with: that is an error
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
