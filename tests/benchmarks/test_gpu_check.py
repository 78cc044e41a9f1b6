"""The GPU check runs through on a CPU, says what it found, survives what fails, and goes on where it stopped."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import jobs
import psutil
import pytest
import torch

from benchmarks import kernels
from benchmarks.gpu_check import basics, install, runner, traced
from benchmarks.gpu_check.report import Place
from benchmarks.gpu_check.steps import NAMES, STEPS
from ds_llm.config import run as config
from ds_llm.memory.plan import Planner, Setting

pytestmark = pytest.mark.slow  # the dry run takes two minutes, once for most of the tests

PRETRAINED = ("pretrain_dense", "pretrain_small", "pretrain_experts")
OPTIONAL = ("bitsandbytes", "flash_attn", "cuml")


def command(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(out), *arguments]


def call(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(out, *arguments), cwd=jobs.ROOT, env=jobs.environment(), capture_output=True, text=True, timeout=580
    )


def steps_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())["steps"]


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> Path:
    """Results of a dry run of all steps."""
    out = tmp_path_factory.mktemp("gpu-check") / "out"
    done = call(out, "--dry-run", "--minutes", "9")
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()[-5000:]
    return out


def test_every_step_ends_well(dry):
    steps = steps_of(dry)
    assert tuple(steps) == NAMES
    assert {name: s["status"] for name, s in steps.items() if name != "optional"} == dict.fromkeys(NAMES[:-1], "ok")
    parts = {row["package"]: row["result"] for row in steps["optional"]["tables"]["parts"]}
    assert set(parts) == set(OPTIONAL) and set(parts.values()) <= {"ok", "not installed"}
    assert steps["optional"]["status"] == ("ok" if "ok" in parts.values() else "not installed")
    for entry in steps.values():
        about = entry["about"]
        assert (
            about["versions"]["torch"] == torch.__version__ and about["machine"]["cpu"] and not about["machine"]["gpus"]
        )
        assert entry["commit"] and entry["date"] and 0 < entry["seconds"] < entry["limit_s"]


def test_figures_of_card_kernels_and_attention(dry):
    steps = steps_of(dry)
    card, tests, table = (steps[name]["figures"] for name in ("card", "kernel_tests", "kernels"))
    assert card["copy_gb_per_s"] > 0.1 and card["fp32_product_tflop_per_s"] > 1e-4
    assert tests["failed_tests"] == [] and tests["outcomes"]["passed"] > 10
    rows = steps["kernels"]["tables"]["kernels"]
    assert sorted(row["kernel"] for row in rows) == sorted({case.kernel for case in kernels.load_cases(small=True)})
    assert table["measured"] == table["of"] == len(rows) and rows[0]["kernel"].startswith("linear cross-entropy")
    assert all(row["us"] > 0 and row["of roofline"] > 0 and row["eager / ours"] > 0 for row in rows)
    packed, whole = steps["attention"]["tables"]["calls"]
    assert packed["mask"] == "none" == whole["mask"]  # documents attend one after the other
    assert (packed["kernel"], whole["kernel"]) == ("ds_llm_documents", "sdpa")
    assert all("scaled_dot_product" in " ".join(row["operators"]) for row in (packed, whole))
    times = {row["attention"]: row for row in steps["attention"]["tables"]["time"]}
    flash = times["causal, flash"]["us"]
    assert (
        len(times) >= 4
        and "documents under a mask" in times
        and all(row["of_causal_flash"] == pytest.approx(row["us"] / flash) for row in times.values())
    )


@pytest.mark.parametrize("name", PRETRAINED)
def test_figures_of_pretraining(dry, name):
    entry = steps_of(dry)[name]
    figures = entry["figures"]
    assert figures["tokens_per_s"] == pytest.approx(1e3 * figures["tokens_per_step"] / figures["step_ms"])
    assert figures["tokens_per_step"] == 2 * 64
    assert figures["first_loss"] == pytest.approx(math.log(512), abs=0.3)  # an untrained model knows nothing
    keys = ["model.dim=64", "model.n_layers=2", "model.n_heads=4", "model.max_seq_len=64", "train.batch_size=2"]
    keys += ["model.vocab_size=512", f"zero={figures['zero']}"]
    if name == "pretrain_experts":
        keys += ["model.use_moe=true", "model.n_routed_experts=64", "model.num_experts_per_tok=8"]
        keys += ["model.moe_intermediate_size=16"]
    planner = Planner(config.load(None, keys), 1, touched=True)
    assert figures["parameters"] == planner.outline.parameters
    assert figures["plan_gb"] == pytest.approx(planner.estimate(Setting(figures["zero"])).total / 1e9)
    assert figures["memory_of_plan"] == pytest.approx(figures["memory_gb"] / figures["plan_gb"])
    assert 0 < figures["idle_share"] < 1 and figures["profiled_steps"] in (3, 5)
    rows = entry["tables"]["longest kernels"]
    times = [row["ms_per_step"] for row in rows]
    assert len(rows) == 10 and times == sorted(times, reverse=True) and times[-1] > 0
    assert any("mm" in row["kernel"] for row in rows)
    assert figures["continued_from_step"] in (8, 16) and 11 <= figures["killed_at_step"] < 24
    assert figures["continued_from_step"] <= figures["killed_at_step"]
    assert figures["equal_before_the_kill"] and figures["equal_to_the_bit"] and figures["what_differs"] == []
    assert figures["compared"] > 50 and figures["largest_loss_difference"] == 0


def test_figures_of_tuning_scoring_and_sparse(dry):
    steps = steps_of(dry)
    for mode in ("sft", "dpo"):
        figures, rows = steps[mode]["figures"], steps[mode]["tables"]["trainers"]
        assert figures["tokens_per_step"] > 20 and figures["tokens_per_s"] == rows[0]["tokens_per_s"] > 0
        assert (len(rows) > 1) == (figures["trl"] == "measured")
        assert all(row["peak_gb"] > 0.05 and row["loss_difference"] < 1e-3 for row in rows)
    figures, rows = steps["scoring"]["figures"], steps["scoring"]["tables"]["contestants"]
    rates = {row["contestant"]: row["rows_per_s"] for row in rows}
    assert figures["tokens_per_row"] == 48 and figures["command_rows"] == 96 and not figures["command_rows_with_error"]
    assert figures["ours_to_batch_1"] == pytest.approx(rates["ours"] / rates["batch 1"])
    assert figures["of_floor"] == pytest.approx(rates["ours"] / rates["floor"])
    assert figures["command_rows_per_s"] == pytest.approx(96 / figures["command_seconds"]["scoring"], rel=0.01)
    assert all(row["tokens_per_s"] == pytest.approx(48 * row["rows_per_s"]) for row in rows)
    assert next(row["differs"] for row in rows if row["contestant"] == "ours") < 0.05
    figures = steps["sparse"]["figures"]
    assert figures["density"] == 0.1 and 0.1 < figures["state_of_re_masked"] < 0.5  # embeddings are whole
    assert figures["loss_difference"] < 1e-5 and figures["time_of_re_masked"] > 0


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def agrees(shown: str, value: object) -> bool:
    """Whether a cell of the page says what the JSON holds."""
    if isinstance(value, bool):
        return shown == ("yes" if value else "no")
    if isinstance(value, (int, float)):
        return float(shown.replace(",", "")) == pytest.approx(value, rel=1e-3, abs=0.51 if abs(value) >= 1000 else 0)
    if value is None or value in ([], {}):
        return shown == "-"
    if isinstance(value, list):
        return all(agrees(part, item) for part, item in zip(shown.split(", "), value, strict=True))
    if isinstance(value, dict):
        parts = [part.rpartition(" ") for part in shown.split(", ")]
        return all(agrees(part, value[name]) for name, _, part in parts) and len(parts) == len(value)
    return shown.replace("\\|", "|") == " ".join(value.split("\n"))


def test_page_and_json_agree(dry):
    page = (dry / "results.md").read_text()
    assert page.startswith("# Dry run")
    sections = dict(part.split("\n", 1) for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:])
    overview = {row[0]: row for row in map(cells, page.partition("## ")[0].splitlines()[4:]) if row}
    steps = steps_of(dry)
    assert set(sections) == set(overview) == set(steps)
    compared = 0
    for name, entry in steps.items():
        assert overview[name][1] == entry["status"] and agrees(overview[name][2], entry["seconds"])
        tables = re.split(r"^### .*: (.*)$", sections[name], flags=re.MULTILINE)
        figures = dict(cells(line) for line in tables[0].splitlines() if line.startswith("|"))
        for key, value in entry["figures"].items():
            assert agrees(figures[key], value), (name, key, figures[key], value)
            compared += 1
        found = dict(zip(tables[1::2], tables[2::2], strict=True))
        assert set(found) == set(entry["tables"])
        for title, rows in entry["tables"].items():
            head, _, *lines = (cells(line) for line in found[title].splitlines() if line.startswith("|"))
            for line, row in zip(lines, rows, strict=True):
                for column, shown in zip(head, line, strict=True):
                    assert agrees(shown, row.get(column)), (name, title, column, shown)
                    compared += 1
    assert compared > 300


def test_second_call_passes_over_what_ended_well(dry):
    before = (dry / "results.json").read_bytes(), (dry / "log.txt").read_bytes()
    done = call(dry, "--dry-run", "--only", "card", "pretrain_small", "scoring")
    assert done.returncode == 0 and done.stdout.count("ended well before") == 3
    assert before == ((dry / "results.json").read_bytes(), (dry / "log.txt").read_bytes())
    done = call(dry)  # no dry run
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def write_wheel(folder: Path, name: str, number: str) -> None:
    info = f"{name}-{number}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{number}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "HERE = True\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def test_a_broken_wheel_stops_no_other_and_nothing_is_replaced(tmp_path):
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    write_wheel(wheels, "gpu_check_probe", "1.5")
    write_wheel(wheels, "torch", "99.0")
    (wheels / "gpu_check_broken-2.0-py3-none-any.whl").write_bytes(b"cut off")
    done = call(out, "--dry-run", "--wheels", str(wheels), "--only", "card")
    assert done.returncode == 1 and "without a good end: wheels" in done.stderr
    steps = steps_of(out)
    assert steps["wheels"]["status"] == "failed" and "gpu_check_broken-2.0" in steps["wheels"]["error"]
    result = {row["package"]: row for row in steps["wheels"]["tables"]["wheels"]}
    assert result["gpu-check-probe"]["installed"] == "yes" and result["torch"]["installed"] == "was there"
    assert result["torch"]["version"] == torch.__version__
    assert steps["wheels"]["figures"] == {"installed": 1, "there_before": 1}
    assert steps["card"]["status"] == "ok" and steps["card"]["about"]["versions"]["torch"] == torch.__version__
    (wheels / "gpu_check_broken-2.0-py3-none-any.whl").unlink()
    done = call(out, "--dry-run", "--wheels", str(wheels), "--only", "card")
    assert done.returncode == 0 and "card: ended well before" in done.stdout
    assert steps_of(out)["wheels"]["status"] == "ok"


def alive(folder: Path) -> list[int]:
    """Processes whose command names a folder."""
    return [
        p.pid for p in psutil.process_iter(["cmdline"]) if any(str(folder) in word for word in p.info["cmdline"] or ())
    ]


def test_a_step_over_its_limit_is_ended_and_tried_again(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    install.link_checkout(scratch / install.SITE)
    results, place = runner.Results(out, dry_run=True), Place(scratch, toy=True)
    by_name = {step.name: step for step in STEPS}
    # the first figures are there after the imports, the last after four trainings
    limit, entry = 8.0, {}
    while "plan_gb" not in entry.get("figures", {}) and limit < 60:
        status = runner.run(by_name["pretrain_small"], results, place, "abc", limit)
        limit, entry = 1.3 * limit, steps_of(out)["pretrain_small"]
    assert status == entry["status"] == "timed out" and not alive(scratch) and "ended after" in entry["error"]
    assert "plan_gb" in entry["figures"] and "equal_to_the_bit" not in entry["figures"]
    assert runner.run(by_name["card"], results, place, "abc", 0.3) == "timed out"
    done = call(out, "--dry-run", "--only", "card")
    assert done.returncode == 1 and "another check works there" in done.stderr
    del results  # and with it the lock of the folder
    done = call(out, "--dry-run", "--only", "card")
    assert done.returncode == 0 and steps_of(out)["card"]["status"] == "ok"
    assert steps_of(out)["pretrain_small"] == entry


def test_ended_from_outside(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen(
        command(out, "--dry-run", "--only", "scoring"), cwd=jobs.ROOT, env=jobs.environment(), stderr=subprocess.PIPE
    ) as check:
        end = time.monotonic() + 60
        while not (out / "results.json").exists() or "about" not in steps_of(out).get("scoring", {}):
            assert time.monotonic() < end
            time.sleep(0.05)
        (step,) = [p for p in psutil.Process(check.pid).children() if "benchmarks.gpu_check.step" in p.cmdline()]
        check.send_signal(signal.SIGTERM)
        assert b"the same command goes on" in check.stderr.read()
    assert check.returncode == 1 and not step.is_running()
    assert steps_of(out)["scoring"]["status"] == "running"
    assert "| scoring | running |" in (out / "results.md").read_text()
    done = call(out, "--dry-run", "--only", "scoring", "--minutes", "0.1")  # less than a step is begun with
    assert done.returncode == 1 and "no time left" in done.stdout and steps_of(out)["scoring"]["status"] == "running"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--only", "card"], 1, "torch finds no GPU"),
        (["--dry-run", "--only", "cards"], 2, "invalid choice: 'cards'"),
        (["--dry-run", "--minutes", "0"], 2, "invalid positive value"),
        (["--dry-run", "--wheels", "/nowhere"], 1, "no wheel there"),
        (["--dry-run"], 1, "is no result of this check"),
    ],
)
def test_mistakes_are_named(tmp_path, arguments, code, text):
    if "finds no GPU" in text and torch.cuda.is_available():
        pytest.skip("this machine has a GPU: what is said without one cannot be seen")
    (tmp_path / "results.json").write_text("[]")
    done = call(tmp_path, *arguments)
    assert done.returncode == code and text in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "results.json").read_text() == "[]"


def test_busy_share_counts_overlaps_once():
    for _ in range(20):
        spans = [sorted(random.sample(range(1000), 2)) for _ in range(random.randint(0, 30))]
        start, end = sorted(random.sample(range(1000), 2))
        covered = sum(any(a <= t < b for a, b in spans) for t in range(start, end))
        assert traced.busy([tuple(span) for span in spans], start, end) == pytest.approx(covered / (end - start))


def test_kernels_come_in_the_order_of_worth():
    names = ["rope", "expand", "rope", "linear cross-entropy + backward", "rope", "expand"]
    cases = [kernels.KernelCase(name, str(i), 1, dict) for i, name in enumerate(names)]
    assert [case.shape for case in basics.in_order_of_worth(cases)] == ["3", "0", "1", "2", "5", "4"]
    assert [case.shape for case in basics.in_order_of_worth(cases, shapes=1)] == ["3", "0", "1"]


def test_the_wheels_script_names_no_host():
    text = (jobs.ROOT / "benchmarks" / "gpu_wheels.sh").read_text()
    assert "://" not in text and "index-url" not in text and "deepspeed" in text


def test_the_page_names_every_step_and_its_limit():
    page = (jobs.ROOT / "docs" / "gpu_check.md").read_text()
    rows = [cells(line) for line in page.splitlines() if re.match(r"\| `(\w+)`(, `\w+`)? \| \d", line)]
    found = {name: int(row[1].split()[0]) for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert found == {step.name: step.seconds for step in STEPS}
