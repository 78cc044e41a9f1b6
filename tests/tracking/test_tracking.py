"""What a run leaves behind: metrics without gaps or doubles, event files, W&B offline, and what the terminal shows."""

import json
import math
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from jobs import PATIENCE, environment

from ds_llm import hardware
from ds_llm.config.run import load
from ds_llm.errors import UserError
from ds_llm.tracking import metrics_file as metrics
from ds_llm.tracking.throughput import Meter
from ds_llm.tracking.tracker import Tracker

STEPS, SAVE_EVERY = 400, 7
# trains nothing: it reports figures that are a function of the step, as a training loop does, and "saves"; where it is
# to be killed it stands still before its end
LOOP = """
import os, sys, time
from pathlib import Path
from ds_llm.config.run import load
from ds_llm.tracking.throughput import Meter
from ds_llm.tracking.tracker import Tracker

output, start, total, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
tracker = Tracker(load(None, sys.argv[5:]), output, total_steps=total, start_step=start, run_info={"world_size": 1})
meter = Meter(total_steps=total)
meter.start()
for step in range(start + 1, total + 1):
    time.sleep(pause)
    while step > int(os.environ.get("STAND_STILL_AFTER", total)):
        time.sleep(1)
    loss = 2 + 1 / (step % 89 + 1)
    tracker.step({"step": step, "epoch": step / 100, "loss": loss, "grad_norm": 1 / step, "lr": 1e-3 / step,
                  "tokens": 64 * step, "samples": step, **meter.step(step, 64)})
    if step % 5 == 0:
        ppl = 100 / step
        with tracker.pause():
            pass
        tracker.evaluation({"step": step, "epoch": step / 100, "perplexity": ppl, "baseline_perplexity": 100.0,
                            "trend_percent": ppl - 100, "best_perplexity": ppl})
    if step % 7 == 0:
        tracker.sync()
        (output / "saved.tmp").write_text(str(step))
        (output / "saved.tmp").replace(output / "saved")
tracker.summary({"steps": total, "final_loss": loss})
tracker.close()
"""


def loop(
    output,
    start: int,
    total: int = STEPS,
    pause: float = 0.0,
    *overrides: str,
    stand_still: int | None = None,
    **kwargs,
) -> subprocess.Popen:
    command = [sys.executable, "-c", LOOP, str(output), str(start), str(total), str(pause), *overrides]
    more = {} if stand_still is None else {"STAND_STILL_AFTER": str(stand_still)}
    return subprocess.Popen(command, env=environment(**more), **{"stdout": subprocess.DEVNULL, **kwargs})


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, as TensorBoard itself reads the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def step_record(step: int, **fields) -> dict:
    return {"step": step, "epoch": step / 10, "loss": 2.0, "grad_norm": 1.0, "lr": 1e-3, "tokens": step, **fields}


def wandb_records(path) -> list:
    """Records of W&B's offline file: LevelDB's log format (blocks of 32 KiB, crc, length and type before each part)."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, found = path.read_bytes(), 7, b"", []  # 7 bytes of W&B's own header
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def test_a_killed_and_resumed_run_leaves_the_records_of_an_undisturbed_one(tmp_path):
    """SIGKILL twice at a random moment; metrics file and event files have every step once, with the same values."""
    random = np.random.default_rng()
    saved = 0
    for half in (1, 2):
        job = loop(tmp_path, saved, pause=0.01, stand_still=half * STEPS // 2 - SAVE_EVERY)
        current = saved
        deadline = time.monotonic() + PATIENCE
        while current <= saved and time.monotonic() < deadline:
            time.sleep(0.02)
            current = int((tmp_path / "saved").read_text()) if (tmp_path / "saved").exists() else 0
        time.sleep(random.uniform(0, 0.5))
        job.send_signal(signal.SIGKILL)
        assert job.wait(PATIENCE) == -signal.SIGKILL
        saved = int((tmp_path / "saved").read_text())
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')  # a line cut short by the kill
    assert loop(tmp_path, saved).wait(PATIENCE) == 0

    records = metrics.read(tmp_path / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert [r["loss"] for r in steps] == [2 + 1 / (s % 89 + 1) for s in range(1, STEPS + 1)]
    assert [r["step"] for r in records if r["kind"] == "eval"] == list(range(5, STEPS + 1, 5))
    assert [r["kind"] for r in records].count("summary") == 1 and records[-1]["final_loss"] == steps[-1]["loss"]
    assert [r["step"] for r in records if r["kind"] == "event" and r["event"] == "start"][2] == saved
    found = scalars(tmp_path / "tensorboard")
    for name in ("loss", "ppl", "grad_norm", "lr", "tokens_per_s", "memory_gb"):
        assert [s for s, _ in found[f"train/{name}"]] == list(range(1, STEPS + 1))
        np.testing.assert_allclose([v for _, v in found[f"train/{name}"]], [r[name] for r in steps], rtol=1e-6)
    assert [s for s, _ in found["eval/perplexity"]] == list(range(5, STEPS + 1, 5))


def test_records_after_the_step_resumed_from_are_dropped_and_events_stay(tmp_path):
    config = load(None, ["tracking.tensorboard=false"])
    tracker = Tracker(config, tmp_path, total_steps=9, run_info={})
    for step in range(1, 10):
        tracker.step(step_record(step, loss=math.nan if step == 2 else 1 / step))
    tracker.event("skip", "not a number", step=2)
    tracker.evaluation({"step": 9, "perplexity": math.inf})
    tracker.summary({"steps": 9})
    tracker.close()
    before = metrics.deterministic(metrics.read(tmp_path / "metrics.jsonl"))
    assert before[1]["loss"] is None and before[-1]["perplexity"] is None
    tracker = Tracker(config, tmp_path, total_steps=9, start_step=4, run_info={})
    tracker.evaluation({"step": 4, "perplexity": 3.0})
    tracker.evaluation({"step": 4, "perplexity": 2.0})  # repeated after a resume: the later one counts
    tracker.close()
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert metrics.deterministic(records)[:4] == before[:4]
    assert [r["event"] for r in records if r["kind"] == "event"] == ["start", "skip", "start"]
    assert [(r["step"], r["perplexity"]) for r in records if r["kind"] == "eval"] == [(4, 2.0)]
    assert not any(r["kind"] == "summary" for r in records)


def test_a_damaged_metrics_file_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 1}\nrubbish\n{"kind": "step", "step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        metrics.read(path)
    with pytest.raises(UserError, match="line 2"):
        Tracker(load(None, []), tmp_path, total_steps=3, start_step=2, run_info={})
    assert "rubbish" in path.read_text()


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    tracker = Tracker(load(None, []), tmp_path, total_steps=1, run_info={})
    with tracker.pause():
        tracker.step(step_record(1))
    tracker.summary({"steps": 1})
    tracker.sync()
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_lines_where_there_is_no_terminal(tmp_path, capsys):
    tracker = Tracker(load(None, ["tracking.log_every=4"]), tmp_path, total_steps=10, run_info={})
    tracker.evaluation({"step": 0, "epoch": 0.0, "perplexity": 60.0, "baseline_perplexity": 60.0, "trend_percent": 0.0})
    for step in range(1, 11):
        tracker.step(step_record(step, loss=math.log(50), mfu=0.417, tokens_per_s=12345.0, memory_gb=1.5, eta=75.0))
    tracker.evaluation(
        {
            "step": 10,
            "epoch": 1.0,
            "perplexity": 45.0,
            "baseline_perplexity": 60.0,
            "trend_percent": -25.0,
            "best_perplexity": 45.0,
            "samples": [{"prompt": "To be", "text": " or [bold]not"}],
        }
    )
    tracker.summary({"steps": 10, "tokens": 3104086, "best_perplexity": 45.0})
    tracker.close()
    text = capsys.readouterr().out
    shown = [line for line in text.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in shown] == ["1/10", "4/10", "8/10", "10/10"]
    for part in ("epoch 0.40", "loss 3.9120", "ppl 50.00", "lr 1.00e-03", "grad 1.000", "12,345 tok/s", "MFU 41.7%",
                 "mem 1.50 GB", "1:15 left"):  # fmt: skip
        assert part in shown[1]
    assert "evaluation  step 0  epoch 0.00  perplexity 60.00  the baseline" in text
    assert "perplexity 45.00  -25.0 % against the baseline 60.00  best so far" in text
    assert "'To be' → or [bold]not" in text
    assert re.search(r"Summary\n.*\n.*steps +│ 10 .*\n.*tokens +│ 3,104,086 ", text) and "\x1b" not in text


def test_a_live_line_on_a_terminal(tmp_path):
    """In a real pseudo-terminal: the bar is drawn over and over, with all figures, and is gone at the end."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    job = loop(tmp_path, 0, 40, 0.05, "tracking.tensorboard=false", stdout=slave, stderr=slave, stdin=slave)
    os.close(slave)
    raw = b""
    deadline = time.monotonic() + PATIENCE
    while job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        try:
            raw += os.read(master, 1 << 16)
        except (BlockingIOError, OSError):
            continue
    os.close(master)
    assert job.poll() == 0
    shown = raw.decode(errors="replace")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert shown.count("training") > 3 and "\x1b[1A\x1b[2K" in shown  # drawn again over the line before
    for part in (r"/40 steps", r"epoch 0\.\d\d", r"loss 2\.\d{4}", r"ppl \d", r"lr \d\.\d\de-0\d", r"grad \d",
                 r"\d tok/s", r"mem \d\.\d\d GB", r"\d+ s left",
                 r"-\d+\.\d % against the baseline 100\.00"):  # fmt: skip
        assert re.search(part, plain), part
    assert plain.rstrip().endswith("┘")  # the summary is the last thing on the screen


def test_wandb_offline_stays_in_the_runs_folder_and_off_the_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        options = ["enabled=true", "mode=offline", "log_every=2", "watch=all", "watch_every=3", "log_code=true"]
        config = load(None, [f"tracking.wandb.{option}" for option in options] + ["tracking.tensorboard=false"])
        tracker = Tracker(config, tmp_path / "run", total_steps=6, run_info={"parameters": 5})
        model = torch.nn.Linear(4, 1)
        tracker.attach(model)
        losses = []
        for step in range(1, 7):
            loss = model(torch.randn(8, 4)).pow(2).mean()
            loss.backward()
            losses.append(loss.item())
            tracker.step(step_record(step, loss=loss.detach()))
        sample = [{"prompt": "a", "text": "b"}]
        tracker.evaluation({"step": 6, "perplexity": 7.5, "samples": sample})
        tracker.summary({"best_perplexity": 7.5})
        tracker.close()
        with pytest.raises(TimeoutError):
            server.accept()
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    identity = (tmp_path / "run" / "wandb_id").read_text().strip()
    points, artifacts, final = [], set(), {}
    for record in wandb_records(run / f"run-{identity}.wandb"):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            points.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
        elif kind == "summary":
            final.update({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update})
        elif kind == "artifact" or kind == "request":
            artifacts.add(record.artifact.type or record.request.log_artifact.artifact.type)
    sent = {p["step"]: p["train/loss"] for p in points if "train/loss" in p}
    assert sent == pytest.approx({step: losses[step - 1] for step in (2, 4, 6)})
    assert [p["eval/perplexity"] for p in points if "eval/perplexity" in p] == [7.5]
    assert set().union(*points) >= {"gradients/weight/values", "parameters/weight/values", "parameters/bias/bins"}
    histograms = [p["parameters/weight/values"] for p in points if "parameters/weight/values" in p]
    assert [sum(counts) for counts in histograms] == [4, 4]  # due at steps 2 and 6: every 3 steps, sent every 2
    assert "code" in artifacts and final["final/best_perplexity"] == 7.5


def test_wandb_is_refused_where_it_cannot_work(tmp_path):
    with pytest.raises(UserError, match="ZeRO stage 3"):
        Tracker(
            load(None, ["tracking.wandb.enabled=true", "tracking.wandb.watch=all", "zero=3"]),
            tmp_path / "run",
            total_steps=1,
            run_info={},
        )
    assert not (tmp_path / "run").exists()


def test_rates_are_means_over_the_window(monkeypatch):
    """Against sums over the recorded times; MFU by its definition for a card whose peak is known."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(hardware, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    meter = Meter(total_steps=50, flops_per_token=6e9, world_size=4, dtype="bf16", window=5)
    random = np.random.default_rng()
    times, tokens = random.uniform(0.1, 2, 20), random.integers(100, 9000, 20)
    for step in range(1, 21):
        if step == 10:  # an evaluation between two steps does not count
            now[0] += 1000
            meter.start()
        now[0] += times[step - 1]
        found = meter.step(step, int(tokens[step - 1]))
        window = slice(max(0, step - 5), step)
        rate = tokens[window].sum() / times[window].sum()
        assert math.isclose(found["tokens_per_s"], rate, rel_tol=1e-9)
        assert math.isclose(found["eta"], (50 - step) * times[window].mean(), rel_tol=1e-9)
        assert math.isclose(found["step_time"], times[step - 1], rel_tol=1e-9)
        assert math.isclose(found["mfu"], rate * 6e9 / (4 * 989.5e12), rel_tol=1e-9)
    monkeypatch.setattr(hardware, "device_name", lambda: "Some CPU")
    assert "mfu" not in Meter(total_steps=1, flops_per_token=6e9).step(1, 10)
