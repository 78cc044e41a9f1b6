"""Whole runs that share experts, rows or layers: what they log, evaluate, save and continue as runs that do not."""

import json

import pytest
from jobs import launch

from ds_llm.pretrained.loading import load_model

# of the learning rate, so that a run that ends early has the same one
CONSTANT = ["optim.schedule=constant", "optim.warmup_steps=0"]
EXPERTS = ["model.use_moe=true", "model.n_routed_experts=4", "model.num_experts_per_tok=1", "model.n_shared_experts=1"]


def start(output) -> dict:
    return json.loads((output / "metrics.jsonl").read_text().splitlines()[0])


def steps(output) -> tuple[list[dict], list[dict]]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if "grad_norm" in r], [r for r in records if "perplexity" in r]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, corpus):
    """A function that runs an unshared configuration once: its output folder by keys."""
    known = {}

    def run(keys: list[str]):
        name = " ".join(keys)
        if name not in known:
            known[name] = tmp_path_factory.mktemp("alone")
            job = launch("forked", [*keys, f"output={known[name]}"])
            assert job.returncode == 0, job.stderr[-3000:]
        return known[name]

    return run


@pytest.mark.parametrize(
    "shared, extra, zero",
    [
        (["parallel.expert=2"], EXPERTS, 2),
        (["parallel.sequence=2", "train.batch_size=8"], EXPERTS, 3),
        (["parallel.tensor=2", "train.batch_size=8", "eval.prompts=[w1 w2 w3]", "eval.max_new_tokens=4"], [], 1),
    ],
)
def test_a_run_is_the_same_and_continues(alone, tiny, tmp_path, shared, extra, zero):
    keys = [*tiny, *extra, f"zero={zero}", "train.max_steps=4", "ema.enabled=true", *CONSTANT]
    known = alone(keys)
    output = tmp_path / "run"
    first = launch("forked", [*keys, *shared, f"output={output}", "train.max_steps=2"])
    assert first.returncode == 0, first.stderr[-3000:]
    second = launch("forked", [*keys, *shared, f"output={output}"])
    assert second.returncode == 0, second.stderr[-3000:]
    (wanted, measured), (found, evaluated) = steps(known), steps(output)
    for name in ("parameters", "global_batch", "flops_per_token"):
        assert start(output)[name] == start(known)[name], name
    assert [r["step"] for r in found] == [1, 2, 3, 4]
    for mine, other in zip(found, wanted, strict=True):
        assert (mine["samples"], mine["tokens"]) == (other["samples"], other["tokens"])
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert evaluated[0]["perplexity"] == pytest.approx(measured[0]["perplexity"], rel=1e-5)
    assert evaluated[-1]["perplexity"] == pytest.approx(measured[-1]["perplexity"], rel=1e-4)
    mine, other = (dict(load_model(str(f / "model"), dtype="fp32").named_parameters()) for f in (output, known))
    assert mine.keys() == other.keys()
    assert max((mine[name] - other[name]).abs().max() for name in mine) < 1e-3


def test_other_groups_do_not_continue_a_run(alone, tiny, tmp_path):
    keys = [*tiny, "zero=1", "train.max_steps=4", "ema.enabled=true", *CONSTANT]
    job = launch("forked", [*keys, f"output={alone(keys)}", "parallel.sequence=2"])
    assert job.returncode == 1 and "parallel.sequence" in job.stderr


def test_masked_conversations_on_shared_rows(chats, tmp_path):
    """Batches of padded rows, of lengths that the group does not divide, and evaluation on packs of them."""
    keys = ["mode=sft", f"data.train={chats / 'train.jsonl'}", f"data.val={chats / 'val.jsonl'}", "data.seq_len=95"]
    keys += [f"model.path={chats / 'qwen3_moe'}", "data.packing=false", "data.tokens_per_batch=190", "zero=1"]
    keys += ["train.batch_size=1", "train.dtype=fp32", "train.max_steps=3", "optim.lr=1e-3", "eval.batch_size=2"]
    keys += ["tracking.report=false", "tracking.tensorboard=false"]
    kinds = {"alone": [], "rows": ["parallel.sequence=2", "train.accumulation_steps=2"]}
    for name, more in kinds.items():
        job = launch("forked", [*keys, *more, f"output={tmp_path / name}"], DS_LLM_CACHE=str(tmp_path / "cache"))
        assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-3000:]
    (wanted, measured), (found, evaluated) = (steps(tmp_path / name) for name in kinds)
    for mine, other in zip(found, wanted, strict=True):
        assert mine["tokens"] == other["tokens"]
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert [e["perplexity"] for e in evaluated] == pytest.approx([e["perplexity"] for e in measured], rel=1e-4)
