"""The reference pass: equal to scoring pair by pair, continued after a kill, cached, shared by ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import launch
from torch import nn

from ds_llm.data.order import SampleOrder
from ds_llm.errors import UserError
from ds_llm.pretrained.fingerprint import model_fingerprint
from ds_llm.train.reference import FILE, reference_log_probs


class Numbers:
    """Samples whose log-probabilities are known: -i in the first column, -i - 1/2 in the second."""

    columns = 2

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def scored(self, indices) -> list[dict]:
        return [{"index": torch.as_tensor(indices)}]


def by_number(batch: dict) -> torch.Tensor:
    return torch.cat([-batch["index"].float(), -batch["index"].float() - 0.5])


def expected(count: int) -> np.ndarray:
    return np.stack([-np.arange(count), -np.arange(count) - 0.5], 1).astype(np.float32)


def run(folder, forward=by_number, count=23, batch_size=4, needed=None, stop=lambda: False, **key):
    key = {"model": "m"} | key
    return reference_log_probs(
        forward, Numbers(count), seed=1, batch_size=batch_size, cache=folder, key=key, needed=needed, stop=stop
    )


def test_scores_every_pair_once_and_then_never_again(tmp_path):
    seen = []

    def counted(batch):
        seen.extend(batch["index"].tolist())
        return by_number(batch)

    assert np.array_equal(run(tmp_path, counted), expected(23))
    assert sorted(seen) == list(range(23))
    assert np.array_equal(run(tmp_path, counted, batch_size=7), expected(23)) and len(seen) == 23
    run(tmp_path, counted, model="another")
    assert len(seen) == 46
    folders = list(tmp_path.glob("reference-*"))
    assert {json.loads((f / "key.json").read_text())["model"] for f in folders} == {"m", "another"}
    assert all({p.name for p in f.iterdir()} == {"key.json", FILE} for f in folders)


def test_scores_only_what_a_run_needs(tmp_path):
    order, seen = SampleOrder(23, 1).permutation(0), []

    def counted(batch):
        seen.extend(batch["index"].tolist())
        return by_number(batch)

    for needed, known in ((6, 8), (8, 8), (11, 12), (None, 23)):  # whole batches of 4
        values = run(tmp_path, counted, needed=needed)
        assert seen == order[:known].tolist()
        assert np.array_equal(values[order[:known]], expected(23)[order[:known]])
        assert (values[order[known:]] == -np.inf).all()


def test_continues_what_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr("ds_llm.train.reference.SAVE_SECONDS", 0)
    calls = []

    def fails(batch):
        calls.append(batch["index"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return by_number(batch)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fails)
    done = torch.cat(calls[:3]).tolist()
    seen = []

    def counted(batch):
        seen.extend(batch["index"].tolist())
        return by_number(batch)

    assert np.array_equal(run(tmp_path, counted), expected(23))
    assert sorted(seen + done) == list(range(23))
    # a cache that was cut short is computed again, not believed
    (file,) = tmp_path.glob(f"*/{FILE}")
    file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(run(tmp_path, counted), expected(23)) and np.array_equal(np.load(file), expected(23))


def test_stops_when_asked(tmp_path):
    """The first look is behind the first batch of 4, the next one eight batches later."""
    assert run(tmp_path, count=100, stop=lambda: True) is None
    seen, asked = [], []

    def counted(batch):
        seen.extend(batch["index"].tolist())
        return by_number(batch)

    assert run(tmp_path, counted, count=100, stop=lambda: bool(asked) or asked.append(1)) is None
    assert len(seen) == 9 * 4
    assert np.array_equal(run(tmp_path, counted, count=100), expected(100)) and len(seen) == 24 * 4


def test_refuses_a_reference_that_gives_no_number(tmp_path):
    def broken(batch):
        found = by_number(batch)
        return found.masked_fill((batch["index"] == 5).repeat(2), torch.nan)

    with pytest.raises(UserError, match="no finite log-probability for 1 of 23 samples"):
        run(tmp_path, broken)
    assert np.array_equal(run(tmp_path), expected(23))


def test_fingerprint_sees_every_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2).to(torch.bfloat16))
    before = model_fingerprint(model)
    assert model_fingerprint(model) == before
    for parameter in model.parameters():
        with torch.no_grad():
            kept = parameter.flatten()[-1].clone()
            parameter.view(-1)[-1] = kept * 1.01 + 0.01
            assert model_fingerprint(model) != before
            parameter.view(-1)[-1] = kept
    assert model_fingerprint(model) == before


WORKER = """
import sys, numpy as np, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
import test_reference as t
dist.init_process_group("gloo")
seen = []
def forward(batch):
    total = torch.ones(1)
    dist.all_reduce(total)  # a forward pass under ZeRO-3 is a collective: unequal calls would hang
    seen.append(len(batch["index"]))
    return t.by_number(batch)
for folder in sys.argv[1:]:
    seen.clear()
    values = t.run(folder, forward)
    assert np.array_equal(values, t.expected(23))
    sys.stdout.write("%d %d\\n" % (dist.get_rank(), len(seen)))  # one write: both ranks share the pipe
    sys.stdout.flush()
dist.destroy_process_group()
"""


def test_two_ranks_share_the_work(tmp_path):
    """6 chunks are 3 calls each; with one part known from an earlier run of one process, the rest is 5 chunks."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent)))
    fresh, begun = tmp_path / "fresh", tmp_path / "begun"
    run(begun)
    (file,) = begun.glob(f"*/{FILE}")
    values = np.load(file)
    file.unlink()
    values[SampleOrder(23, 1).permutation(0)[4:]] = -np.inf
    np.save(file.with_name("part-00007.npy"), values)
    done = launch("forked", [str(fresh), str(begun), str(fresh)], script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = sorted(line for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 "))
    assert lines == sorted(["0 3", "1 3", "0 3", "1 3", "0 0", "1 0"])
    assert not list(tmp_path.glob("*/*/part-*"))
