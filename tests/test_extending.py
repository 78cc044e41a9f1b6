"""docs/extending.md is true word by word: its blocks are applied to a copy of the project, and its commands run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import ROOT, environment

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.M | re.S)
COPIED = ("ds_llm", "kernels", "launch", "ds_configs", "tests", "pyproject.toml", "README.md")
# Runs the commands that it reads, each in a fork of a process that has imported the libraries.
SERVER = """
import json, os, runpy, sys, traceback
import deepspeed, torch, torch._dynamo, transformers.generation, matplotlib.pyplot, pyarrow, torch.utils.tensorboard

for line in sys.stdin:
    arguments, variables, out = json.loads(line)
    if (pid := os.fork()) == 0:
        code = 1
        try:
            os.environ |= variables
            for number in (1, 2):
                os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            module = arguments[0] == "-m"
            sys.argv = arguments[module:]
            if module:
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def change(text: str, diff: str) -> str:
    """`text` with a block of changed lines applied: what it says is there must be there, once."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(before) == 1, f"{text.count(before)} times in the file:\n{before}"
    return text.replace(before, after)


class Copy:
    """A copy of the project with the page applied to it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = environment(PYTHONPATH=str(folder))
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=folder,
            env=self.environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.ran = 0

    def run(self, line: str) -> tuple[int, str]:
        """Exit code and output of a command of the page."""
        words = shlex.split(line)
        variables = dict(word.split("=", 1) for word in words[: words.index("python")])
        out = self.folder / f"out-{self.ran}.txt"
        self.ran += 1
        print(json.dumps([words[words.index("python") + 1 :], variables, str(out)]), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline()), out.read_text()

    def start(self, line: str) -> subprocess.Popen:
        """A command of the page in a process of its own: one that must import Triton itself."""
        words = [sys.executable, *shlex.split(line)[1:]]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            words, cwd=self.folder, env=self.environment, text=True, stdout=pipe, stderr=subprocess.STDOUT
        )


@pytest.fixture(scope="module")
def copy(tmp_path_factory, corpus) -> Copy:
    folder = tmp_path_factory.mktemp("project")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    if not (folder / "ds_llm" / "kernels").exists():  # where an installation maps it to
        os.symlink("../kernels", folder / "ds_llm" / "kernels")
    for kind, block in BLOCKS:
        head, _, body = block.partition("\n")
        if kind == "diff":
            file = folder / head.removeprefix("--- ")
            file.write_text(change(file.read_text(), body))
        elif kind:
            file = folder / head.removeprefix("# ")
            assert not file.exists(), file
            file.write_text(body)
    data = folder / "data" / "demo"
    shutil.copytree(corpus, data)
    rows = [{"text": " ".join(f"w{i + j}" for j in range(9))} for i in range(7)]
    (data / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"prompt": row["text"], "completion": "w1 w2"} for row in rows]
    (data / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    made = Copy(folder)
    yield made
    made.server.stdin.close()
    made.server.wait()


COMMANDS = [
    line
    for kind, block in BLOCKS
    if not kind
    for line in block.replace("\\\n", " ").splitlines()
    if "tests/test_extending.py" not in line
]


def command(*parts: str) -> str:
    """The command of the page that has these parts; each command is asked for once."""
    (found,) = (line for line in COMMANDS if all(part in line for part in parts))
    ASKED.add(found)
    return found


ASKED: set[str] = set()


@pytest.mark.slow
def test_kernel_and_family(copy):
    checks = [command("test_squared_relu"), command("test_accelerate")]
    # one process for both: most of its time is what it imports
    words = shlex.split(checks[1])
    words.insert(words.index("-k"), shlex.split(checks[0])[3])
    words[words.index("-k") + 1] = f"({words[words.index('-k') + 1]}) or squared_relu"
    tests, compiling = copy.start(shlex.join(words)), copy.start(command("compile_check"))
    out, _ = tests.communicate()
    assert tests.returncode == 0, out
    # 12 of values and 1 of the operator, each on both paths; the family
    assert "27 passed" in out, out
    out, _ = compiling.communicate()
    assert compiling.returncode == 0 and "4 kernels compiled" in out and "0 failed or spilled" in out, out
    assert re.search(r"^squared relu bf16 backward +sm_90 .* 0$", out, re.M), out


def test_key(copy):
    code, out = copy.run(command("--print-config"))
    assert code == 0 and "noisy:\n  share: 0.3\n" in out
    code, out = copy.run("python launch/train.py noisy.share=much")
    assert code == 2 and "noisy.share" in out and len(out.splitlines()) == 1, out
    code, out = copy.run("python launch/train.py noisy.share=1")
    assert code == 2 and out == "error: noisy.share: 1.0 must be less than 1\n"
    code, out = copy.run(command("ds_llm.config"))
    assert code == 0 and "| `noisy.share` | `0.15` |" in out and "(pretrain, noisy, sft" in out


def test_mode_figure_and_metrics(copy):
    code, out = copy.run(command("noisy.yaml"))
    assert code == 0, out
    assert re.search(r"step 2/2 .* replaced \d\d\.\d%", out), out
    run = copy.folder / "runs" / "noisy"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["step"] for r in steps] == [1, 2]
    assert all(0.3 < r["replaced"] < 0.7 and r["loss"] > 0 for r in steps)
    assert "Replaced tokens" in (run / "report.html").read_text()
    assert any(r["kind"] == "eval" and r["step"] == 2 for r in records)

    code, out = copy.run(command("rare.py"))
    assert code == 0, out
    scores = [json.loads(line) for line in (copy.folder / "rare.jsonl").read_text().splitlines()]
    assert len(scores) == 7 and all(0 <= row["rare"] <= 1 and row["entropy"] > 0 for row in scores)

    code, out = copy.run(command("generations"))
    assert code == 0 and re.search(r"^exact \d+\.\d\d ", out, re.M), out
    code, out = copy.run("python launch/train.py eval.generation_metrics=[exact] --print-config")
    assert code == 0 and "- exact" in out


def test_architecture(copy):
    code, out = copy.run(command("make_model.py"))
    assert code == 0, out
    code, out = copy.run(command("output=runs/parallel"))
    assert code == 0 and "step 1/1" in out, out
    saved = json.loads((copy.folder / "runs" / "parallel" / "model" / "config.json").read_text())
    assert saved["model_type"] == "ds_llm_parallel_block"
    code, out = copy.run(command("evaluate.py perplexity"))
    assert (code == 0 and out.startswith("perplexity ")) or "\nperplexity " in out, out


def test_every_command_of_the_page_ran():
    assert set(COMMANDS) == ASKED
