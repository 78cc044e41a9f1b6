import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import PATIENCE

from ds_llm.commands.prepare import add_commands
from ds_llm.data.tokens import TokenFile
from ds_llm.errors import UserError

from .conftest import random_text, write_jsonl

SCRIPT = Path(__file__).resolve().parents[2] / "launch/prepare.py"
# for DS_LLM_EXTENSIONS: the work does not end before it is interrupted
STAND_STILL = """
import time
from ds_llm.data import resumable
write, written = resumable.AppendFile.write, []

def held(self, data):
    written.append(len(data))
    while len(written) > COUNT:
        time.sleep(0.01)
    return write(self, data)

resumable.AppendFile.write = held
"""


def run(*words) -> None:
    parser = argparse.ArgumentParser()
    add_commands(parser)
    arguments = parser.parse_args([str(word) for word in words])
    arguments.command(arguments)


def script(*words, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), **options)


def environment() -> dict:
    return os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}


def test_from_raw_text_to_tokens(tmp_path, texts, capsys):
    rows = [{"body": text} for text in texts]
    write_jsonl(tmp_path / "raw.jsonl", [*rows, rows[5], {"body": ""}, {"body": 1}, {"text": "x"}])
    run("clean", tmp_path / "raw.jsonl", "--out", tmp_path / "clean.jsonl", "--field", "body", "--workers", 1)
    table = capsys.readouterr().out
    for reason in ("duplicate", "empty", "wrong type", "missing field"):
        assert f"dropped: {reason}" in table
    assert f"{len(set(texts)):,}" in table and str(tmp_path / "clean.jsonl.rejects.jsonl") in table
    clean = tmp_path / "clean.jsonl"
    run("tokenizer", clean, "--out", tmp_path / "tokenizer", "--field", "body", "--vocab-size", 300)
    assert "Vocabulary: 300 tokens" in capsys.readouterr().out
    out = ["--out", tmp_path / "clean.bin", "--tokenizer", tmp_path / "tokenizer", "--validation", 0.3]
    run("tokens", clean, *out, "--field", "body", "--workers", 1)
    text = capsys.readouterr().out
    train, validation = (TokenFile(tmp_path / name) for name in ("clean.bin", "clean.val.bin"))
    assert train.meta["documents"] + validation.meta["documents"] == len(set(texts))
    assert f"{len(validation):,} tokens" in text and f"{len(train):,} in all" in text
    run("tokens", clean, *out, "--field", "body")
    assert "nothing to do" in capsys.readouterr().out
    run("clean", tmp_path / "raw.jsonl", "--out", clean, "--field", "body")
    assert "nothing to do" in capsys.readouterr().out  # outputs of one stem, clean.jsonl and clean.bin, do not meet


def test_mistakes_are_one_line_and_an_exit_code(tmp_path):
    done = script("clean", tmp_path / "absent.jsonl", "--out", tmp_path / "out.jsonl")
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path / 'absent.jsonl'}: no such file or folder\n"
    done = script("tokens", "x.jsonl", "--out", "x.bin", "--tokenizer", "x", "--worker", "zero")
    assert done.returncode == 2
    assert "--workers" in done.stderr and "Traceback" not in done.stderr
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / "file").write_text("x")
    done = script("clean", tmp_path / "a.jsonl", "--out", tmp_path / "file" / "out.jsonl")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_interrupted_by_the_keyboard_it_says_how_to_go_on(tmp_path):
    rng = random.Random(5)
    text = random_text(rng, 200)
    for i in range(40):
        write_jsonl(tmp_path / f"{i}.jsonl", [{"text": f"{i} {k} {text}"} for k in range(100)])
    (tmp_path / "extension.py").write_text(STAND_STILL.replace("COUNT", str(rng.randint(4, 40))))
    out = tmp_path / "out/clean.jsonl"
    command = [sys.executable, str(SCRIPT), "clean", str(tmp_path), "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(
        command,
        env=environment() | {"DS_LLM_EXTENSIONS": str(tmp_path / "extension.py")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not out.with_name("clean.jsonl.partial").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.2))
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers too
    stderr = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130, stderr
    assert stderr == "error: interrupted; run the same command again to continue\n"


def test_options_are_checked_before_anything_is_read(capsys):
    for words in (["clean", "x", "--out", "y.jsonl", "--min-chars", "0"], ["tokenize"], []):
        with pytest.raises(SystemExit) as stop:
            run(*words)
        assert stop.value.code == 2
    with pytest.raises(UserError, match=r"y\.txt: the cleaned file's name ends with"):
        run("clean", "x", "--out", "y.txt")
