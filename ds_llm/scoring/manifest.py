"""The identity of a scoring run, known before any expensive work, and the manifest that a folder keeps of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ds_llm.data import chat
from ds_llm.data.sources import Source, resolve
from ds_llm.data.supervised import find_format
from ds_llm.data.tokens import tokenizer_hash
from ds_llm.distributed.environment import rank
from ds_llm.errors import ConfigError, UserError
from ds_llm.pretrained.lengths import max_positions
from ds_llm.pretrained.loading import load_model_config, load_tokenizer, locate
from ds_llm.scoring import options
from ds_llm.scoring.metrics import create
from ds_llm.scoring.options import ScoreConfig, output_field
from ds_llm.scoring.parts import differences

VERSION = 2  # of the stored form and of how batches are cut: another one continues no run
WORK = ("missing.npy", "parts", "index", "merge")  # of no use once the output is there
RESULTS = ("manifest.json", "statistics.json", "rows.parquet", "tokens.parquet", "report.html", "*.npy", *WORK)
WEIGHTS = (".safetensors", ".bin", ".gguf", ".json")


@dataclass
class Job:
    """A checked scoring run.

    settings: everything that the scores depend on, without data and weights, which are read later. columns: the
    metrics' columns that hold a number. arrays: their other columns.
    """

    config: ScoreConfig
    folder: Path
    sources: list[Source]
    formats: list[str]
    tokenizer: object
    columns: list[str]
    arrays: list[str]
    settings: dict

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def fields(self) -> dict[str, str]:
        """Column -> name in the output."""
        return self._names(self.columns)

    @property
    def files(self) -> dict[str, Path]:
        """Array -> its file."""
        return {column: self.folder / f"{name}.npy" for column, name in self._names(self.arrays).items()}

    def _names(self, columns: list[str]) -> dict[str, str]:
        return {column: output_field(column, self.config.metric, self.config.field) for column in columns}

    def encoder_arguments(self) -> tuple:
        """Of `samples.encoder`."""
        c = self.config
        taken = [] if c.only_idx else list(self.fields.values())
        return self.tokenizer, c.metric, c.tokens, c.template, self.settings["max_length"], c.truncate, taken

    def index_key(self, data: list[str]) -> str:
        """Hash of everything that the index depends on. data: hashes of the sources."""
        *_, taken = self.encoder_arguments()
        return hashlib.sha256(json.dumps([self.settings, data, taken], sort_keys=True).encode()).hexdigest()


def prepare(config: ScoreConfig) -> Job:
    """Check options and files without reading rows and weights. Raises `UserError`."""
    model_config = load_model_config(config.model)
    metrics = create(config.metric, model_config)
    columns = [name for metric in metrics for name in metric.columns()]
    arrays = [name for metric in metrics for name in metric.arrays]
    positions = max_positions(model_config)
    if positions and config.max_length and config.max_length > positions:
        raise ConfigError(f"score.max_length: {config.max_length:,}, but {config.model} has {positions:,} positions")
    tokenizer = load_tokenizer(config.model)
    folder = Path(f"{config.out}.d")
    sources = [_without_output(source, (Path(config.out), folder)) for source in resolve(config.data)]
    known = options.FORMATS[1:]
    formats = [find_format(source, known) if config.format == "auto" else config.format for source in sources]
    if any(name in ("messages", "alpaca") for name in formats):
        if config.template == "none":
            raise ConfigError("score.template: conversations need a chat template; none is for prompts and completions")
        chat.check_template(tokenizer)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    settings = {
        "version": VERSION,
        "metric": list(config.metric),
        "formats": formats,
        "tokenizer": [tokenizer_hash(tokenizer), special, tokenizer.chat_template],
        "max_length": config.max_length or positions,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "dtype": "fp32" if config.dtype == "auto" and not torch.cuda.is_available() else config.dtype,
    }
    for name in ("tokens", "template", "truncate", "per_token", "zero3", "tensor_parallel"):
        settings[name] = getattr(config, name)
    if arrays:
        settings["arrays"] = arrays
    job = Job(config, folder, sources, formats, tokenizer, columns, arrays, settings)
    for path in job.files.values():
        if path.parent != folder or path.name == "missing.npy":
            raise ConfigError(f"score.field: {path.stem}: cannot be the name of a file; choose another one")
    return job


def _without_output(source: Source, own: tuple[Path, Path]) -> Source:
    """A source without this run's own outputs, which a folder or a pattern may match."""
    own = tuple(os.path.realpath(path) + os.sep for path in own)
    kept = tuple(file for file in source.files if not (os.path.realpath(file.path) + os.sep).startswith(own))
    if source.files and not kept:
        raise UserError(f"{source.name}: is both the input and the output; choose another --out")
    return dataclasses.replace(source, files=kept)


def lock(job: Job) -> AbstractContextManager:
    """Lock the output for this run, on rank 0. Raises `UserError` where another run holds it."""
    if rank():
        return nullcontext()
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(job.folder / ".lock", timeout=0).acquire()
    except Timeout:
        raise UserError(f"{job.folder}: another run is writing here; wait for it or choose another --out") from None
    except OSError as error:
        raise UserError(f"{job.folder}: cannot be written ({error.strerror or error}); choose another --out") from None


def read_json(path: Path) -> dict:
    """The content of a JSON file; empty where it is missing."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path}: not readable as JSON; start over with --overwrite") from None


def open_manifest(job: Job, data: list[str]) -> dict:
    """The manifest of the run in the folder, if it is this run; empty for a new run. Does not compare the weights.

    Raises `UserError` where the folder or the output belong to another run; with `overwrite` they are removed.
    """
    manifest = read_json(job.folder / "manifest.json") if not job.config.overwrite else _lenient(job.folder)
    known = {**job.settings, "data": data}
    there = {name: manifest["settings"].get(name) for name in known} if manifest else known
    trouble = None
    if difference := differences(there, known):
        trouble = f"{job.folder}: holds the scores of another run, with another {difference}"
    elif manifest and job.config.tokens_per_batch not in ("auto", manifest["settings"]["tokens_per_batch"]):
        trouble = (
            f"{job.folder}: holds the scores of a run with tokens_per_batch={manifest['settings']['tokens_per_batch']}"
        )
    elif finished := manifest.get("finished"):
        if shown := differences(finished["shown"], _shown(job)):
            trouble = f"{job.out}: is finished with another {shown}"
        elif job.config.overwrite:
            trouble = "start over"
        elif not job.out.exists() or job.out.stat().st_size != finished["bytes"]:
            trouble = f"{job.out}: was finished here before, but has been changed or removed since"
    elif not manifest and job.out.exists():
        trouble = f"{job.out}: is there already, of unknown origin"
    if trouble is None:
        return manifest
    if not job.config.overwrite:
        raise UserError(f"{trouble}; repeat its command, choose another --out, or start over with --overwrite")
    start_over(job)
    return {}


def start_over(job: Job) -> None:
    """Remove the output and the folder of its run."""
    job.out.unlink(missing_ok=True)
    remove(job.folder, RESULTS)


def remove(folder: Path, names: tuple[str, ...]) -> None:
    for path in [path for name in names for path in folder.glob(name)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_weights(job: Job, manifest: dict, fingerprint: str) -> dict:
    """The manifest if it is of a model with these weights; else starts over and returns an empty one."""
    if not manifest or manifest["settings"]["model"] == fingerprint:
        return manifest
    if not job.config.overwrite:
        raise UserError(
            f"{job.folder}: holds the scores of a run with another model (other weights or configuration); repeat its "
            "command, choose another --out, or start over with --overwrite"
        )
    start_over(job)
    return {}


def finish(job: Job, manifest: dict) -> dict:
    """The manifest of a finished run."""
    finished = {"shown": _shown(job), "bytes": job.out.stat().st_size, "model_files": model_files(job.config.model)}
    return {**manifest, "finished": finished}


def same_files(job: Job, manifest: dict) -> bool:
    """Whether a finished run had the same model files, without reading the weights."""
    now = model_files(job.config.model)
    return now is not None and now == manifest["finished"]["model_files"]


def model_files(path: str) -> list | None:
    """Name, size and modification time of each file of a model folder; None for other names and for adapters."""
    source = locate(path)
    if source.adapter or not Path(source.name).is_dir():
        return None
    stats = [(p, p.stat()) for p in sorted(Path(source.name).iterdir()) if p.suffix in WEIGHTS]
    return [[os.path.abspath(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def _shown(job: Job) -> dict:
    arrays = {"arrays": [path.name for path in job.files.values()]} if job.arrays else {}
    return {"field": list(job.fields.values()), "only_idx": job.config.only_idx, **arrays}


def _lenient(folder: Path) -> dict:
    """The manifest, or an empty one where it cannot be read: a run to overwrite may be damaged."""
    try:
        return read_json(folder / "manifest.json")
    except UserError:
        return {}
