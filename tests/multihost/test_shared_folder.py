"""Ranks that do not share the output folder: each keeps and finds its part, at ZeRO stages that write different files.

One of two processes gets a folder of its own at the output's path, in a mount namespace of its own, and a host name.
"""

import json
import re
import shutil
from pathlib import Path

import hosts
import pytest
from jobs import launch

from ds_llm.tracking import metrics_file as metrics

APART = """
import ctypes, os, socket, subprocess
if os.environ["RANK"] == "1":
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x00020000 | 0x04000000) == 0, ctypes.get_errno()  # CLONE_NEWNS, CLONE_NEWUTS
    socket.sethostname("other")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", OWN, OUTPUT], check=True)
"""


@pytest.fixture
def apart(tmp_path):
    """The output of rank 0, that of rank 1, and the environment in which they are at one path."""
    if reason := hosts.missing():
        pytest.skip(reason)
    output, own = tmp_path / "run", tmp_path / "own"
    output.mkdir()
    own.mkdir()
    extension = tmp_path / "apart.py"
    extension.write_text(APART.replace("OWN", repr(str(own))).replace("OUTPUT", repr(str(output))))
    return output, own, {"DS_LLM_EXTENSIONS": str(extension)}


def change_places(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    (one / "checkpoints").rename(aside)
    (other / "checkpoints").rename(one / "checkpoints")
    aside.rename(other / "checkpoints")


def one_error(job) -> str:
    assert job.returncode != 0
    (line,) = [line for line in job.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("zero", [0, 3])
def test_a_run_goes_on_from_parts_in_two_folders_as_if_nothing_was(tiny, apart, zero):
    output, own, environment = apart
    arguments = [*tiny, f"zero={zero}", "ema.enabled=true", "model.dropout=0.1", "checkpoint.every_steps=2"]
    arguments += ["train.max_steps=4", "checkpoint.keep=0", "data.val=[]", f"output={output}"]
    first = launch("forked", arguments, **environment)
    assert first.returncode == 0, first.stderr
    expected = [r for r in metrics.read(output / "metrics.jsonl") if r["kind"] == "step"]
    for folder, ranks in ((output, [0]), (own, [1])):
        last = folder / "checkpoints" / "step-00000004"
        manifest = json.loads((last / "manifest.json").read_text())
        assert manifest["ranks"] == ranks and manifest["world_size"] == 2
        files = {str(p.relative_to(last)) for p in last.rglob("*") if p.is_file()} - {"manifest.json"}
        assert files == set(manifest["files"])
        assert any(name.startswith("model/") for name in files) == (ranks == [0])
        assert any(name.startswith("ema_rank") for name in files)
        shutil.rmtree(last)
    assert not (own / "metrics.jsonl").exists() and not list(own.glob(".here-*"))
    again = launch("forked", arguments, **environment)
    assert again.returncode == 0 and "step-00000002" in again.stdout, again.stdout + again.stderr
    found = [r for r in metrics.read(output / "metrics.jsonl") if r["kind"] == "step"]
    assert metrics.deterministic(found) == metrics.deterministic(expected) and len(found) == 4
    if zero:  # without ZeRO all have the same states
        change_places(output, own)
        refused = launch("forked", [*arguments, "train.max_steps=6"], **environment)
        line = one_error(refused)
        assert "step-00000004: the machines share no folder, and " in line
        first, second = (rf"lacks \S+_rank_0*{rank}\S+ and \d+ more" for rank in (0, 1))
        me = hosts.here()
        lacking = rf"{me} {first} \(on other\); other {second} \(on {me}\): start them in the order they had"
        assert re.search(lacking, line), line
        assert "parameters, fp32" not in refused.stdout  # no model was built
        change_places(output, own)
    shutil.rmtree(own / "checkpoints")  # a new machine in the place of the second
    (own / ".lock").unlink()
    refused = launch("forked", [*arguments, "train.max_steps=6"], **environment)
    line = one_error(refused)
    assert "the checkpoint of step 4 is on " in line and "start the machines that saved it" in line
