"""Runs continue on other numbers of processes and at other ZeRO stages with all of their states, or say why not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from devices import FP16_IN_JOBS, in_fp16_jobs
from jobs import PATIENCE, ROOT, launch, start
from safetensors.torch import load_file

from ds_llm.checkpoint import elastic
from ds_llm.config import deepspeed as deepspeed_config
from ds_llm.config import run as config
from ds_llm.config.options import to_dict
from ds_llm.engine import nvme as offload
from ds_llm.engine import resharding as reshard
from ds_llm.errors import ConfigError, UserError
from ds_llm.tracking import metrics_file as metrics

WORKER = Path(__file__).with_name("elastic_worker.py")
# name: model, dtype, ZeRO stage at which two processes save it
SAVED = {f"experts-fp32-{stage}": ("experts", "fp32", stage) for stage in (0, 3)}
SAVED |= {f"experts-bf16-{stage}": ("experts", "bf16", stage) for stage in range(4)}
SAVED |= {f"experts-fp16-{stage}": ("experts", "fp16", stage) for stage in (0, 3)}
SAVED |= {f"{model}-{stage}": (model, "bf16", stage) for model, stage in (("lora", 2), ("sparse", 3))}
SAVED |= {f"offload-{stage}": ("experts", "bf16", f"{stage} offload") for stage in (2, 3)}
# processes, name, stage at which they continue
CASES = [(1, "experts-fp32-0", 1), (1, "experts-fp32-3", 0), (4, "experts-fp32-0", 0), (4, "experts-fp32-3", 2)]
CASES += [(1, f"experts-bf16-{stage}", stage) for stage in range(4)]
CASES += [(4, f"experts-bf16-{stage}", (stage + 2) % 4) for stage in range(4)]
CASES += [(4, "experts-fp16-0", 2), (1, "experts-fp16-3", 0)]
CASES += [(4, "lora-2", 3), (1, "lora-2", 1), (4, "sparse-3", 2), (1, "sparse-3", 3)]
CASES += [(1, "offload-2", "2 offload"), (1, "experts-bf16-2", "2 offload"), (1, "experts-bf16-3", "3 offload")]
CASES += [(4, "offload-3", 3)]
TAKEN = 3  # steps before saving, of the worker
LOSS = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
LAUNCHERS = {1: "forked-1", 2: "forked", 4: "forked-4"}
STEPS = 9
RUN = [  # what has a state and does not depend on the rank: dropout does
    f"train.max_steps={STEPS}",
    "checkpoint.every_steps=3",
    "checkpoint.keep=0",
    "model.use_moe=true",
    "model.n_routed_experts=4",
    "ema.enabled=true",
    "data.val=[]",
    "optim.warmup_steps=4",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What the jobs on 1 and on 4 processes found in what the job on 2 saved, by world size and case."""
    folder = tmp_path_factory.mktemp("elastic")
    possible = [name for name, (_, dtype, _) in SAVED.items() if dtype != "fp16" or FP16_IN_JOBS]
    cases = {2: [(name, *SAVED[name]) for name in possible]}
    for n in (1, 4):
        cases[n] = [(name, *SAVED[name][:2], how) for world, name, how in CASES if world == n and name in possible]
    (folder / "cases.json").write_text(json.dumps(cases))
    reports = {}
    for world, action in ((2, "save"), (1, "load"), (4, "load")):
        job = start(LAUNCHERS[world], [action, str(folder)], WORKER)
        out, err = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, out[-3000:] + err[-3000:]
        reports[world] = json.loads((folder / f"{action}{world}.json").read_text())
        failed = {name: case["error"] for name, case in reports[world].items() if "error" in case}
        assert action == "load" or not failed, failed
    return reports


@pytest.mark.parametrize(
    "world, name, how",
    [pytest.param(*case, marks=in_fp16_jobs) if "fp16" in case[1] else case for case in CASES],
)
def test_all_states_are_those_saved_by_two_processes(found, world, name, how):
    case = found[world][f"{name} -> {how}"]
    assert "error" not in case, case["error"]
    assert case["compared"] > 5 and not case["unequal"]
    # a fresh start has moments of zero and no steps behind it
    assert case["unmoved"] == 0
    assert case["steps"] == [[TAKEN], [TAKEN]]
    assert case["scale"][0] == case["scale"][1]
    losses, expected = case["losses"]
    assert losses == pytest.approx(expected, abs=LOSS[SAVED[name][1]])


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """Run the trainer on some processes; returns the finished job."""
    sizes = ["model.dim=32", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.max_seq_len=32"]
    keys = [f"data.train={corpus / 'train.bin'}", *sizes, "train.batch_size=4", "train.dtype=fp32", "optim.lr=1e-3"]
    keys += ["tracking.log_every=1", "tracking.report=false", "tracking.tensorboard=false", *RUN]

    def launched(processes: int, output: Path, *overrides: str):
        return launch(LAUNCHERS[processes], [*keys, f"output={output}", *overrides])

    return launched


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> Path:
    """A run on 2 processes, never interrupted."""
    output = tmp_path_factory.mktemp("elastic_runs") / "whole"
    job = run(2, output, "zero=2")
    assert job.returncode == 0, job.stdout + job.stderr
    return output


def steps(output: Path) -> dict[int, dict]:
    return {r["step"]: r for r in metrics.read(output / "metrics.jsonl") if r["kind"] == "step"}


def test_the_same_command_continues_on_four_processes_and_then_on_one(run, whole, tmp_path):
    output = tmp_path / "moved"
    shutil.copytree(whole / "checkpoints" / "step-00000003", output / "checkpoints" / "step-00000003")
    four = run(4, output, "zero=3")
    assert four.returncode == 0, four.stdout + four.stderr
    assert "4 processes from here on, 2 before; a step takes 2 x 1 x 4 = 8 samples as before" in four.stdout
    expected, found = steps(whole), steps(output)
    for later in (6, 9):  # what was saved by four comes to an end, to go on from its first checkpoint
        kept = output / "checkpoints" / f"step-{later:08d}"
        assert json.loads((kept / "manifest.json").read_text())["world_size"] == 4
    shutil.rmtree(output / "checkpoints" / "step-00000009")
    one = run(1, output, "zero=0")
    assert one.returncode == 0, one.stdout + one.stderr
    assert "1 process from here on, 4 before; a step takes 4 x 2 x 1 = 8 samples as before" in one.stdout
    found |= {step: record for step, record in steps(output).items() if step > 6}
    assert sorted(found) == list(range(4, STEPS + 1))
    for step, record in found.items():
        assert record["tokens"] == expected[step]["tokens"] and record["samples"] == expected[step]["samples"]
        assert record["lr"] == expected[step]["lr"]
        assert record["loss"] == pytest.approx(expected[step]["loss"], abs=2e-5)
        assert record["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-3)
    last = f"checkpoints/step-{STEPS:08d}/model/model.safetensors"
    ours, theirs = load_file(output / last), load_file(whole / last)
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-5) for name in theirs)
    # and back to where it began, with the keys it began with
    again = run(2, output, "zero=2")
    assert again.returncode == 0, again.stdout + again.stderr


def test_another_global_batch_and_missing_states_are_refused(run, whole, tmp_path):
    saved = whole / "checkpoints" / "step-00000003"
    job = run(1, tmp_path / "a", f"resume={saved}", "train.batch_size=3")
    assert job.returncode == 1 and "Traceback" not in job.stderr
    assert "train.batch_size: the run in" in job.stderr and "takes 8 samples a step, not 3" in job.stderr
    older = tmp_path / "step-00000003"
    shutil.copytree(saved, older)
    manifest = json.loads((older / "manifest.json").read_text())
    for part in older.glob("parts_rank*.json"):
        part.unlink()
        del manifest["files"][part.name]
    (older / "manifest.json").write_text(json.dumps(manifest))
    job = run(1, tmp_path / "c", f"resume={older}")
    assert job.returncode == 1 and "was saved by an earlier version" in job.stderr
    job = run(2, tmp_path / "d", f"resume={older}", "zero=2", "train.max_steps=4")
    assert job.returncode == 0, job.stdout + job.stderr


def test_states_that_cannot_move_stay_where_they_were_saved(monkeypatch, tmp_path):
    monkeypatch.setattr(elastic, "Checkpoint", lambda path: None)
    keys = ["optim.name=muon", "optim.grad_clip=0"]
    now, saved = state(2, keys)
    assert elastic.adapt(now, saved, 2, tmp_path) == []
    message = r"with optim\.name=muon a run continues only as it was saved: start 2 processes with zero=2"
    with pytest.raises(UserError, match=message):
        elastic.adapt(now, saved, 4, tmp_path)
    now, saved = state(2, keys)
    now.zero = 3
    with pytest.raises(UserError, match=message):
        elastic.adapt(now, saved, 2, tmp_path)


def state(processes: int = 2, keys: list[str] = (), **settings) -> tuple[config.Config, dict]:
    """A configuration and the state of a checkpoint of it."""
    now = config.load(None, ["data.train=a.bin", "train.batch_size=6", "train.accumulation_steps=2", *keys])
    now.deepspeed = settings or None
    built = json.loads(json.dumps(deepspeed_config.build(now, processes)))
    return now, {"config": to_dict(now), "world_size": processes, "global_batch": 12 * processes, "deepspeed": built}


@pytest.mark.parametrize("processes, expected", [(1, (6, 4)), (3, (4, 2)), (4, (6, 1)), (8, (3, 1)), (24, (1, 1))])
def test_the_global_batch_is_split_anew(processes, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(elastic, "Checkpoint", lambda path: None)
    now, saved = state()
    notes = elastic.adapt(now, saved, processes, tmp_path)
    assert (now.train.batch_size, now.train.accumulation_steps) == expected
    assert len(notes) == 1 and f"= {24} samples as before" in notes[0]


def test_what_cannot_be_split_or_would_be_another_run_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(elastic, "Checkpoint", lambda path: None)

    def refused(error, match: str, processes: int, change=None, **settings):
        now, saved = state(2, **settings)
        (change or (lambda _: None))(now)
        with pytest.raises(error, match=match):
            elastic.adapt(now, saved, processes, tmp_path)

    forbidden = {"change": lambda c: setattr(c.checkpoint, "elastic", False)}
    refused(UserError, "was saved by 2 processes and this run has 1; start 2", 1, **forbidden)
    refused(UserError, "24 samples a step are not to be split over 5 processes; start 4", 5)
    refused(UserError, "24 samples a step are not to be split over 48 processes; start 24", 48)
    refused(
        UserError,
        r"train\.accumulation_steps: .* 24 samples a step, not 36",
        2,
        lambda c: setattr(c.train, "accumulation_steps", 3),
    )
    refused(ConfigError, "gradient_accumulation_steps: 2 does not give", 4, gradient_accumulation_steps=2)
    refused(UserError, "deepspeed: scheduler: the run", 2, lambda c: setattr(c, "deepspeed", SCHEDULER))
    refused(UserError, "deepspeed: optimizer: the run", 2, lambda c: setattr(c, "deepspeed", LION))
    now, saved = state()
    now.train.batch_size, now.train.accumulation_steps = 4, 3  # another split of the same batch
    assert elastic.adapt(now, saved, 2, tmp_path) == ["a step takes 4 x 3 x 2 = 24 samples"]
    now.zero, now.deepspeed = 3, str(ROOT / "ds_configs" / "zero3_offload.json")
    assert elastic.adapt(now, saved, 2, tmp_path)[-1] == "zero: 3 from here on, 2 before"
    now.checkpoint.elastic = False
    with pytest.raises(UserError, match=r"zero: the run in .* has 2, not 3; set it back, or set checkpoint\.elastic"):
        elastic.adapt(now, saved, 2, tmp_path)


SCHEDULER = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}}
LION = {"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}}


def nvme(folder: Path) -> dict:
    """The shipped JSON for NVMe with its folder and buffers of a small model's size."""
    folder.mkdir(exist_ok=True)
    settings = json.loads((ROOT / "ds_configs" / "zero3_nvme.json").read_text())
    parts = [settings["zero_optimization"][part] for part in ("offload_optimizer", "offload_param")]
    for part in parts:
        part["nvme_path"] = str(folder)
    parts[1] |= {"buffer_size": 500_000, "max_in_cpu": 0}
    return settings


def load_any(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    held = torch.load(path, weights_only=True)
    assert {"exp_avg", "exp_avg_sq", "step"} <= held["state"].keys() and held["state"]["exp_avg"].any()
    return {name: torch.as_tensor(value) for name, value in (held["state"] | {"weight": held["weight"]}).items()}


LIBAIO = Path("/usr/include/libaio.h")


@pytest.mark.skipif(not LIBAIO.exists(), reason="libaio is not installed (Debian: apt-get install libaio-dev)")
def test_states_kept_on_nvme_are_saved_and_continue_there_and_elsewhere(run, tmp_path):
    disk = tmp_path / "disk"
    settings = tmp_path / "nvme.json"
    settings.write_text(json.dumps(nvme(disk)))
    # parts of less than 1 MiB stay in memory: the norms' do, a matrix' do not
    keys = ["model.dim=512", "model.n_layers=1", "model.use_moe=false", "ema.enabled=false", "train.max_steps=4"]
    keys += ["checkpoint.every_steps=2", "optim.warmup_steps=0"]
    first = run(2, tmp_path / "first", *keys, f"deepspeed={settings}")
    assert first.returncode == 0, first.stdout + first.stderr
    saved = tmp_path / "first" / "checkpoints" / "step-00000002"
    assert len(list(saved.glob("swapped_rank*.pt"))) == 2
    again = run(2, tmp_path / "again", *keys, f"deepspeed={settings}", f"resume={saved}")
    assert again.returncode == 0, again.stdout + again.stderr
    ends = [tmp_path / name / "checkpoints" / "step-00000004" for name in ("first", "again")]
    for name in (*(path.name for path in ends[0].glob("swapped_rank*.pt")), "model/model.safetensors"):
        one, other = (load_any(end / name) for end in ends)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    memory = run(1, tmp_path / "memory", *keys, "zero=2", f"resume={saved}")
    assert memory.returncode == 0, memory.stdout + memory.stderr
    for step in (3, 4):
        expected = steps(tmp_path / "first")[step]["loss"]
        assert steps(tmp_path / "memory")[step]["loss"] == pytest.approx(expected, abs=1e-4)
    assert not list(disk.iterdir())  # nothing of the runs is left there


def test_nvme_that_is_not_there_is_one_line(tmp_path):
    settings = {"zero_optimization": nvme(tmp_path / "disk")["zero_optimization"]}
    zero = settings["zero_optimization"]
    with pytest.raises(ConfigError, match="needs libaio, which is not here"):
        offload.check(settings, lambda: False)
    offload.check(settings, lambda: True)
    zero["offload_param"]["nvme_path"] = "/no/such/disk"
    with pytest.raises(ConfigError, match=r"offload_param\.nvme_path: /no/such/disk: no such folder"):
        offload.check(settings, lambda: True)
    zero["stage"] = 2
    with pytest.raises(ConfigError, match=r"offload_optimizer\.device: nvme needs zero=3, not zero=2"):
        offload.check(settings, lambda: True)


def test_runs_with_one_disk_do_not_share_files(tmp_path):
    own = []
    for output in ("a", "b"):
        settings = {"zero_optimization": nvme(tmp_path)["zero_optimization"]}
        offload.take_folders(settings, output, rank=0)
        own.append(Path(settings["zero_optimization"]["offload_param"]["nvme_path"]))
    assert own[0] != own[1] and all(folder.parent == tmp_path for folder in own)
    mine, other = (own[0] / "zero_stage_3" / "optimizer" / f"rank{rank}" for rank in (0, 1))
    for folder in (mine, other):
        folder.mkdir(parents=True)
        (folder / "old.tensor.swp").write_bytes(b"left by a killed run")
    settings = {"zero_optimization": nvme(tmp_path)["zero_optimization"]}
    offload.take_folders(settings, "a", rank=0)
    assert not mine.exists() and other.exists()


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_no_code_of_a_checkpoint_runs(tmp_path, monkeypatch):
    import deepspeed  # noqa: F401 (its classes are those trusted)

    monkeypatch.chdir(tmp_path)
    torch.save({"optimizer_state_dict": Trap()}, "trap.pt")
    with pytest.raises(UserError, match=r"trap\.pt: cannot be read"):
        reshard.read_file("trap.pt", mmap=True)
    assert not Path("trapped").exists()


def test_parts_that_do_not_fit_together_are_refused(tmp_path):
    part = {"optimizer": "Zero12", "inner": "torch.optim.adamw.AdamW", "ranks": 2, "swapped": []}
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    first, second = folder / "parts_rank00000.json", folder / "parts_rank00001.json"
    first.write_text(json.dumps(part | {"fragments": [["w", 0, 0, 5, 0]]}))
    with pytest.raises(UserError, match="has the parts of 1 processes of 2"):
        reshard.Checkpoint(folder)
    for offset in (4, 6):
        second.write_text(json.dumps(part | {"fragments": [["w", 0, 0, 5, offset]]}))
        with pytest.raises(UserError, match="the parts of w overlap or have gaps"):
            reshard.Checkpoint(folder)
    second.write_text(json.dumps(part | {"fragments": [["w", 0, 0, 5, 5]]}))
    reshard.Checkpoint(folder)
    second.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        reshard.Checkpoint(folder)
