"""The whole selection on a tiny model with gates: rows as they were, stages left out, jobs of two processes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from chats import WORDS
from jobs import ROOT, environment, launch

from ds_llm.convert.select_moe import select_moe
from ds_llm.errors import ConfigError, UserError
from ds_llm.models.quality_gate import gates
from ds_llm.pretrained.loading import load_model
from ds_llm.selection import options, pick, report, run

SCRIPT = ROOT / "launch" / "select_data.py"
ROWS = 150


@pytest.fixture(scope="module")
def model(chats, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("select") / "model"
    select_moe(str(chats / "decoder"), folder)
    loaded = load_model(folder, "fp32")
    for gate in gates(loaded):
        gate.reset_parameters(std=0.5)
    loaded.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path) -> list[str]:
    lines = [f'{{"n": 1E2, "text":"{" ".join(random.choices(WORDS, k=random.randint(1, 9)))}" }}' for _ in range(ROWS)]
    lines[11], lines[70] = "{bad", '{"text": ""}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:60]) + "\n")
    (tmp_path / "b.jsonl").write_text("\r\n".join(lines[60:]))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def configure(model, data, output, *more) -> options.SelectionConfig:
    given = [f"score.model={model}", f"score.data={json.dumps(data)}", f"output={output}", "score.tokens_per_batch=200"]
    return options.load(None, [*given, "cluster.k=5", "select.percentage=0.2", *more])


def files(output) -> dict[str, bytes]:
    names = ("selected_data.jsonl", "rows.parquet", "clusters.npy", "scores.jsonl", "scores.jsonl.d/router.npy")
    return {name: (output / name).read_bytes() for name in names}


def test_the_pick_is_of_the_data_as_it_is(model, data, tmp_path):
    output = tmp_path / "out"
    result = run.select(configure(model, data, output, "score.metric=[entropy]"))
    given = [line for name in data for line in Path(name).read_bytes().replace(b"\r\n", b"\n").split(b"\n") if line]
    table = pq.read_table(output / "rows.parquet").to_pydict()
    assert len(table["idx"]) == ROWS == result["rows"] and result["usable"] == ROWS - 2
    assert result["unusable"] == {"bad JSON": 1, "empty": 1} and table["cluster"][11] is table["quality"][70] is None
    usable = [i for i in range(ROWS) if i not in (11, 70)]
    scores = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    assert [row["quality"] for row in scores] == table["quality"] and "entropy" in scores[0]
    quality, labels = (np.array([table[name][i] for i in usable]) for name in ("quality", "cluster"))
    expected = [usable[i] for i in pick.round_robin(quality, labels, int(148 * 0.2))]
    assert result["picked"] == 29 and [i for i in range(ROWS) if table["picked"][i]] == sorted(expected)
    assert [table["order"][i] for i in expected] == list(range(29))
    written = (output / "selected_data.jsonl").read_bytes().split(b"\n")
    assert [line.rstrip(b"\r") for line in written[:-1]] == [given[i] for i in sorted(expected)] and written[-1] == b""
    means = result["mean_quality"]
    assert means["picked"] == pytest.approx(np.mean([table["quality"][i] for i in expected]))
    assert means["all"] == pytest.approx(quality.mean()) and result["clusters"] == len(set(labels)) == 5
    drawn = {usable[i] for i in pick.random(148, 29, 0)}
    assert result["random"]["common"] == len(drawn & set(expected))
    by_chance = (output / "random_data.jsonl").read_bytes().splitlines()
    assert by_chance == [given[i] for i in sorted(drawn)]
    page = (output / "report.html").read_text()
    assert page.count("<svg") == 3 and "Cluster 4: picked" in page and "http:" not in page.replace("http://www.w3", "")
    assert json.loads((output / "report.json").read_text()) == result


def test_a_stage_is_left_out_while_what_it_depends_on_is_as_it_was(model, data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    made = []
    for name in ("cluster", "input_lines"):
        real = getattr(run, name)
        monkeypatch.setattr(run, name, lambda *a, name=name, real=real: made.append(name) or real(*a))
    first = run.select(configure(model, data, output))
    assert made == ["cluster", "input_lines"]
    before = files(output)
    assert run.select(configure(model, data, output)) == first and made == ["cluster", "input_lines"]
    assert "clusters: made before" in capsys.readouterr().out
    run.select(configure(model, data, output, "select.pick=stratified"))  # only the pick
    assert made[2:] == ["input_lines"]
    run.select(configure(model, data, output, "cluster.k=3"))
    assert made[3:] == ["cluster", "input_lines"] and np.load(output / "clusters.npy").max() == 2
    (output / "selected_data.jsonl").unlink()
    run.select(configure(model, data, output, "cluster.k=3"))
    assert made[5:] == ["input_lines"]

    def die(*_):
        raise KeyboardInterrupt

    broken = tmp_path / "broken"
    for place in ((run, "cluster"), (report, "write")):  # what is done before is kept, what is not is done again
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*place, die)
            run.select(configure(model, data, broken))
    assert run.select(configure(model, data, broken)) == first
    assert files(broken) == before
    with open(data[0], "a") as file:
        file.write('{"text": "red"}\n')
    with pytest.raises(UserError, match="another data"):
        run.select(configure(model, data, output, "cluster.k=3"))
    assert run.select(configure(model, data, output), overwrite=True)["rows"] == ROWS + 1


def test_other_picks_and_scores(chats, model, data, tmp_path):
    output = tmp_path / "out"
    more = ["score.metric=[entropy,perplexity]"]
    for how in ("top_k", "random", "farthest"):
        result = run.select(configure(model, data, output, *more, f"select.pick={how}"))
        assert result["picked"] == 29
    table = pq.read_table(output / "rows.parquet").to_pydict()
    assert sorted(i for i in table["order"] if i is not None) == list(range(29))
    run.select(configure(model, data, output, "score.metric=[entropy,quality]", "select.quality=perplexity",
                         "select.best=lowest", "select.pick=top_k"))  # fmt: skip
    table = pq.read_table(output / "rows.parquet").to_pydict()
    usable = [i for i in range(ROWS) if table["quality"][i] is not None]
    lowest = sorted(usable, key=lambda i: (table["quality"][i], i))[: int(len(usable) * 0.2)]
    assert sorted(lowest) == [i for i in range(ROWS) if table["picked"][i]]
    # a model without experts has no clusters
    dense = ["select.quality=entropy", "cluster.method=none", "select.pick=top_k"]
    assert run.select(configure(chats / "llama", data, tmp_path / "dense", *dense))["clusters"] == 1


def test_two_processes_write_the_bytes_of_one(model, data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run.select(configure(model, data, one))
    more = [f"score.data={json.dumps(data)}", "score.tokens_per_batch=200", "cluster.k=5", "select.percentage=0.2"]
    done = launch("forked", [f"score.model={model}", f"output={two}", *more], script=SCRIPT)
    assert done.returncode == 0, done.stderr
    assert files(one) == files(two) and "k-means" not in done.stderr
    assert "29 of 148 rows from 5 of 5 clusters" in done.stdout and "2 of 150 rows cannot be picked" in done.stdout
    assert done.stdout.count("report: ") == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["score.out=x.jsonl"], "score.out: is the selection's to set"),
        (["score.data=[]"], "score.data: not given"),
        (["cluster.method=none", "select.pick=farthest"], "farthest needs features"),
        (["select.percentage=1.5"], "select.percentage: 1.5 must be at most 1"),
        (["select.pick=robin"], "did you mean 'round_robin'"),
    ],
)
def test_wrong_options_are_one_line(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        configure("model", ["data"], tmp_path, *overrides)


def test_so_few_rows_that_none_is_picked(model, data, tmp_path):
    with pytest.raises(UserError, match=r"0\.001 of 148 rows is not one row"):
        run.select(configure(model, data, tmp_path / "out", "select.percentage=0.001"))


def test_other_scripts_still_find_the_standard_librarys_select():
    """`launch/select.py` has the name of a module, and lies where the others look first."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import select, subprocess; print(select.__name__, select.poll())"
    )
    arguments = [sys.executable, "-c", code, str(ROOT / "launch")]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), cwd=os.sep)
    assert done.returncode == 0 and done.stdout.startswith("select <select.poll"), done.stderr


def test_former_name_is_the_same_command(tmp_path):
    def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "launch" / script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)

    share = f"{random.uniform(0.1, 0.9):.3f}"
    options = ["--print-config", "score.model=m", f"output={tmp_path}", f"select.percentage={share}"]
    for data, code, word in (
        (["score.data=[a.jsonl]"], 0, f"percentage: {float(share)}\n"),
        ([], 2, "error: score.data"),
    ):
        former, current = (run(script, *options, *data) for script in ("select.py", SCRIPT.name))
        assert (former.returncode, former.stdout, former.stderr) == (code, current.stdout, current.stderr)
        assert word in former.stdout + former.stderr
