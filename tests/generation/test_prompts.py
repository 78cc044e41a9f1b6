"""launch/generate.py and the prompts it reads: files with good and bad rows, a typed conversation, wrong options."""

import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import PATIENCE
from test_generation import CONTEXT, make

from ds_llm.generation.generator import Generator
from ds_llm.generation.prompts import converse
from ds_llm.generation.sampling import SamplingParams

LAUNCH = Path(__file__).parents[2] / "launch" / "generate.py"
GREEDY = SamplingParams(temperature=0, max_new_tokens=8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    generator = make()
    generator.model.save_pretrained(folder / "model")
    generator.tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def generator(saved) -> Generator:
    return Generator(saved)


@pytest.fixture
def launch(monkeypatch, capsys):
    """Runs the script in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(LAUNCH), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(LAUNCH), run_name="__main__")
        return exit_.value.code or 0, *capsys.readouterr()

    return run


def test_prompt_stream_and_several_answers(launch, saved, generator):
    greedy = ("--greedy", "--max-new-tokens", 8)
    expected = generator.generate("once", GREEDY)
    assert launch("--model", saved, "--prompt", "once", *greedy) == (0, expected + "\n", "")
    assert launch("--model", saved, "--prompt", "once", "--stream", *greedy) == (0, expected + "\n", "")
    chat = [{"role": "system", "content": "brief"}, {"role": "user", "content": "once"}]
    found = launch("--model", saved, "--prompt", "once", "--system", "brief", *greedy)
    assert found == (0, generator.chat(chat, GREEDY) + "\n", "")
    options = SamplingParams(num_return_sequences=2, seed=5, temperature=2, top_k=9, max_new_tokens=8, stop=("e", "f"))
    several = [one.text for one in next(generator.complete(["once"], options))]
    sampling = ["--num-return-sequences=2", "--seed=5", "--temperature=2", "--top-k=9", "--max-new-tokens=8"]
    sampling += ["--stop=e", "--stop=f"]
    assert launch("--model", saved, "--prompt", "once", *sampling) == (0, "\n---\n".join(several) + "\n", "")


def test_file_of_prompts(launch, saved, generator, tmp_path):
    rows = [
        b'{"prompt": "one", "id": 7}',
        b"",
        b'{"prompt": "two"',
        '{"prompt": "größer"}'.encode(),
        b'{"text": "three"}',
        b"[1]",
        b'{"messages": [{"role": "user", "content": "hi"}], "id": "x"}',
        b'{"messages": [{"role": "user"}]}',
        json.dumps({"prompt": "a" * CONTEXT}).encode(),
        b'{"prompt": "\xff"}',
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(rows))
    options = ("--greedy", "--max-new-tokens", 8, "--batch-size", 2)
    code, out, err = launch("--model", saved, "--batch-file", source, "--output", target, *options)
    assert (code, out) == (0, "")
    found = [json.loads(line) for line in target.read_text().splitlines()]
    good = {0: ("one", {"prompt": "one", "id": 7}), 2: ("größer", {"prompt": "größer"})}
    for place, (prompt, values) in good.items():
        one = next(generator.complete([prompt], GREEDY))[0]
        made = {"completion": one.text, "finish_reason": one.finish_reason, "tokens": len(one.token_ids)}
        assert found[place] == values | made
    assert found[5]["completion"] == generator.chat("hi", GREEDY) and found[5]["id"] == "x"
    bad = {row["line"]: row["error"] for row in found if "error" in row}
    assert [line for line in bad] == [3, 5, 6, 8, 9, 10] and len(found) == 9
    parts = ["not JSON", "no text in the field 'prompt'", "not a JSON object", "message 1", "64 tokens", "not UTF-8"]
    assert all(part in error for part, error in zip(parts, bad.values(), strict=True))
    assert "line 3: not JSON" in err and "6 of 9 rows could not be used" in err and "line 10" not in err

    lines = tmp_path / "in.txt"
    lines.write_text("one\n\n  two\n")
    code, out, err = launch("--model", saved, "--batch-file", lines, "--chat", "--num-return-sequences", 2, "--seed", 1)
    found = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [(row["prompt"], row["sample"]) for row in found] == [("one", 0), ("one", 1), ("  two", 0), ("  two", 1)]

    for name, content, message in (
        ("empty.jsonl", "\n", "no usable prompt"),
        ("bad.jsonl", "{}", "no usable prompt; line 1"),
        ("prompts.csv", "a", "ends with .jsonl or .txt"),
    ):
        (tmp_path / name).write_text(content)
        code, out, err = launch("--model", saved, "--batch-file", tmp_path / name)
        assert (code, out) == (1, "") and err.startswith("error: ") and message in err and err.count("\n") == 1
    code, _, err = launch("--model", saved, "--batch-file", tmp_path / "none.jsonl")
    assert code == 1 and "none.jsonl: cannot be read" in err
    code, _, err = launch("--model", saved, "--batch-file", source, "--output", source)
    assert code == 1 and "name another output" in err and source.read_bytes() == b"\n".join(rows)
    code, _, err = launch("--model", saved, "--batch-file", source, "--output", tmp_path / "no" / "out.jsonl")
    assert code == 1 and "cannot be written" in err


def test_wrong_use_is_told_in_one_line(launch, saved):
    for arguments, code, message in (
        (("--model", saved), 2, "one of the arguments --prompt --interactive --batch-file is required"),
        (("--model", saved, "--prompt", "a", "--output", "x"), 2, "need --batch-file"),
        (("--model", saved, "--interactive", "--stream"), 2, "--stream needs --prompt"),
        (("--model", saved, "--prompt", "a", "--top-p", "2"), 2, "error: top_p: 2.0 must be between"),
        (("--model", saved, "--prompt", "a", "--stream", "--num-beams", "2"), 2, "error: num_beams"),
        (("--model", saved, "--interactive", "--num-return-sequences", "2"), 2, "error: num_return_sequences"),
        (
            ("--model", f"{saved}x", "--prompt", "a"),
            1,
            f"no such file or folder; did you mean {saved}?",
        ),
        (("--model", saved, "--prompt", "a" * 99), 1, "error: the prompt has 99 tokens"),
        (("--model", saved, "--prompt", "a", "--tokenizer", saved / "none"), 1, "none: no such file or folder"),
    ):
        found, out, err = launch(*arguments)
        assert (found, out) == (code, "") and message in err.splitlines()[-1], err


def test_typed_lines_in_a_process(saved, generator):
    """The real script as a person runs it, with a chat, `clear`, a line that is too long, and `quit`."""
    typed = ["hi", "so", "clear", "hi", "", "x" * 100, "Quit", "never read"]
    command = [sys.executable, LAUNCH, "--model", saved, "--interactive", "--chat", "--greedy", "--max-new-tokens", "8"]
    done = subprocess.run(
        list(map(str, command)),
        input="\n".join(typed).encode(),
        capture_output=True,
        timeout=PATIENCE,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    first = generator.chat("hi", GREEDY)
    turns = [("user", "hi"), ("assistant", first), ("user", "so")]
    second = generator.chat([{"role": role, "content": content} for role, content in turns], GREEDY)
    greeting, *answers = done.stdout.decode().split("> ")  # bytes: an answer may hold a carriage return
    assert "clear forgets the conversation" in greeting
    assert answers[:5] == [f"{first}\n", f"{second}\n", "cleared\n", f"{first}\n", ""]
    assert answers[5].startswith("error: the prompt has 103 tokens") and answers[6:] == [""]


def test_conversation_drops_its_oldest_turns_when_the_context_is_full(monkeypatch, capsys, generator):
    asked = []
    encode = generator.encode
    monkeypatch.setattr(generator, "encode", lambda prompt: asked.append(prompt) or encode(prompt))
    monkeypatch.setattr("sys.stdin", io.StringIO("a" * 20 + "\n" + "b" * 20 + "\n" + "c" * 20))
    converse(generator, GREEDY, chat=True, system="sys")
    out = capsys.readouterr().out
    assert "oldest messages no longer fit and are forgotten" in out and "error" not in out
    last = [message["content"] for message in asked[-1]]
    assert last[0] == "sys" and last[-1] == "c" * 20 and "a" * 20 not in last
    assert len(encode(asked[-1])) < CONTEXT


def test_lines_are_continued_on_their_own_without_chat(monkeypatch, capsys, generator):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\nq\nthree"))
    converse(generator, GREEDY)
    first, second = (generator.generate(text, GREEDY) for text in ("one", "two"))
    assert capsys.readouterr().out.split("> ")[1:] == [f"{first}\n", f"{second}\n", ""]
