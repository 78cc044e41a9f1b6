"""Files that extend the commands: what they register is known, a broken one is a line. A broken pipe that is not the
output's is an error."""

import os
import subprocess
import sys

import pytest
from jobs import PATIENCE

from ds_llm import cli
from ds_llm.errors import UserError
from ds_llm.models.quality_loss import QUALITY_LOSSES


def test_extensions_register_what_they_define(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(
            "from ds_llm.models.quality_loss import register_quality_loss\n"
            f"FACTOR = {len(name)}\n\n\n"
            f"@register_quality_loss('{name}')\n"
            "def loss(good, mask):\n    return FACTOR * good\n"
        )
    files = os.pathsep.join(str(tmp_path / f"{name}.py") for name in ("one", "two"))
    monkeypatch.setenv("DS_LLM_EXTENSIONS", files)
    cli.import_extensions()
    try:
        assert [QUALITY_LOSSES[name].function(2, None) for name in ("one", "two")] == [6, 6]
    finally:
        del QUALITY_LOSSES["one"], QUALITY_LOSSES["two"]


@pytest.mark.parametrize("text", [None, "1 / 0", "def ("])
def test_a_broken_extension_is_named(text, tmp_path, monkeypatch):
    if text is not None:
        (tmp_path / "broken.py").write_text(text)
    monkeypatch.setenv("DS_LLM_EXTENSIONS", str(tmp_path / "broken.py"))
    with pytest.raises(UserError, match=r"broken\.py cannot be run: \S"):
        cli.import_extensions()


@pytest.mark.parametrize("own", [True, False])
def test_only_a_reader_of_the_output_may_leave(own):
    code = """
import os, sys
from ds_llm import cli

def main():
    sys.stdin.read()  # until the test has closed the output's other end
    if OWN:
        print("nobody reads this", flush=True)
    reader, writer = os.pipe()
    os.close(reader)
    os.write(writer, b"nor this")

cli.run(main)
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", code.replace("OWN", str(own))], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    if own:
        process.stdout.close()
    process.stdin.close()
    error = process.stderr.read()
    assert (process.wait(PATIENCE), "BrokenPipeError" in error) == ((0, False) if own else (1, True)), error
