"""The kto mode: its loss, its rows, plain torch against it on two processes, what it begins at, what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
from jobs import PATIENCE, ROOT, start
from preferences import (
    BATCH,
    STEPS,
    adamw,
    answer_log_probs,
    in_float64,
    make_models,
    of_kind,
    pair,
    read,
    run,
    same,
    steps,
    update,
    usual,
    write,
)

from ds_llm.commands import show
from ds_llm.config import run as config
from ds_llm.config.mode_sections import KtoConfig
from ds_llm.data.labelled import prepare_labelled
from ds_llm.data.order import SampleOrder
from ds_llm.errors import ConfigError, UserError
from ds_llm.pretrained.loading import load_tokenizer
from ds_llm.tracking import metrics_file as metrics
from ds_llm.train import trainer
from ds_llm.train.modes import kto

SIDES = {True: "chosen", False: "rejected"}


def labelled(number: int) -> dict:
    """A row of a right or a wrong answer: two of three are right."""
    row = pair(number)
    return {"prompt": row["prompt"], "completion": row[SIDES[number % 3 > 0]], "label": number % 3 > 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with labelled answers to train and evaluate on, a start model, another one and a mixture of experts."""
    folder = tmp_path_factory.mktemp("kto")
    write(folder / "train.jsonl", [labelled(i) for i in range(200)])
    write(folder / "val.jsonl", [labelled(i) for i in range(200, 230)])
    write(folder / "pairs.jsonl", [pair(i) for i in range(40)])
    make_models(folder, [pair(i) for i in range(240)])
    return folder


@pytest.fixture
def overrides(world, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("DS_LLM_CACHE", str(tmp_path / "cache"))
    return usual(world, tmp_path / "run", "kto")


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, share", [(0, 0.5), (1, 0.9), (2, 0.0), (3, 1.0)])
def test_matches_the_formula(seed, share):
    """Losses, gradients and figures of equation 7 of the paper, answer by answer, in any split of the batch."""
    random = np.random.default_rng(seed)
    count = 24
    beta, w_good, w_bad = random.uniform(0.05, 2), random.uniform(0.3, 2), random.uniform(0.3, 2)
    policy, reference, off, off_reference = (random.normal(-20, 4, count) for _ in range(4))
    labels = random.random(count) < share
    z = max(0.0, math.fsum(off - off_reference) / count)
    losses, slopes, right = [], [], []
    for p, r, good in zip(policy, reference, labels, strict=True):
        sign, weight = (1, w_good) if good else (-1, w_bad)
        value = weight / (1 + math.exp(-beta * sign * (p - r - z)))
        losses.append(weight - value)
        slopes.append(-sign * beta * value * (1 - value / weight))
        right.append(sign * (p - r - z) > 0)
    reward = beta * (policy - reference)
    means = [reward[labels].mean(), reward[~labels].mean()] if labels.any() and not labels.all() else [math.nan] * 2
    if labels.all() or not labels.any():
        means[int(not labels.any())] = reward.mean()
    logps = [policy[part].mean() if part.any() else math.nan for part in (labels, ~labels)]
    expected = [*means, means[0] - means[1], np.mean(right), z, *logps]
    options = KtoConfig(beta=beta, desirable_weight=w_good, undesirable_weight=w_bad)
    whole = kto.Whole.of(count, int(labels.sum()), float((off - off_reference).sum()))
    tensor = torch.from_numpy(policy).requires_grad_()
    total, sums = 0.0, 0.0
    for part in (slice(0, 7), slice(7, 8), slice(8, count)):
        one, figures = kto.kto(
            options, tensor[part], torch.from_numpy(reference[part]), torch.from_numpy(labels[part]), whole
        )
        total, sums = total + one, sums + figures
    assert total.item() == pytest.approx(math.fsum(losses), rel=1e-12)
    assert torch.autograd.grad(total, tensor)[0].numpy() == pytest.approx(np.array(slopes), rel=1e-9, abs=1e-15)
    assert (sums / count).tolist() == pytest.approx(expected, rel=1e-9, nan_ok=True)


def partners(rows: list[dict]) -> list[int]:
    """For each row the next one of the first epoch that has another prompt."""
    order = SampleOrder(len(rows), 0).permutation(0).tolist()
    found = [0] * len(rows)
    for place, i in enumerate(order):
        following = order[place + 1 :] + order[:place]
        found[i] = next(j for j in following if rows[j]["prompt"] != rows[i]["prompt"])
    return found


class ByHand:
    """KTO of plain torch in float64, one answer at a time, on whole logits."""

    def __init__(self, world, reference: str, kl: bool, w_good: float, w_bad: float):
        self.tokenizer = load_tokenizer(world / "tokenizer")
        self.model, self.frozen = in_float64(world, "model"), in_float64(world, reference)
        self.kl, self.weights = kl, {True: w_good, False: w_bad}

    def ratio(self, prompt: dict, answer: dict) -> tuple[torch.Tensor, float]:
        row = {"prompt": prompt["prompt"], "completion": answer["completion"]}
        policy, _ = answer_log_probs(self.model, self.tokenizer, row, "completion")
        with torch.no_grad():
            reference, _ = answer_log_probs(self.frozen, self.tokenizer, row, "completion")
        return policy - reference, policy.item()

    def figures(self, rows: list[dict], picks, learn: bool = False) -> dict:
        """Of these rows; learn: with the gradients of their mean loss."""
        others, z = partners(rows), 0.0
        if self.kl:
            with torch.no_grad():
                z = max(0.0, sum(self.ratio(rows[i], rows[others[i]])[0].item() for i in picks) / len(picks))
        total, right, rewards, logps = 0.0, 0.0, {True: [], False: []}, {True: [], False: []}
        for i in picks:
            good = rows[i]["label"]
            r, logp = self.ratio(rows[i], rows[i])
            ahead = (r - z) if good else (z - r)
            loss = self.weights[good] * (1 - torch.sigmoid(0.1 * ahead))
            if learn:
                (loss / len(picks)).backward()
            total, right = total + loss.item(), right + 0.5 * (1 + np.sign(ahead.item()))
            rewards[good].append(0.1 * r.item())
            logps[good].append(logp)
        good, bad = np.mean(rewards[True]), np.mean(rewards[False])
        return {
            "loss": total / len(picks),
            "kl": z,
            "reward_desirable": good,
            "reward_undesirable": bad,
            "margin": good - bad,
            "accuracy": right / len(picks),
            "logp_desirable": np.mean(logps[True]),
            "logp_undesirable": np.mean(logps[False]),
        }

    def train(self, rows: list[dict]) -> tuple[list[dict], dict]:
        order, optimizer, found = SampleOrder(len(rows), 0), adamw(self.model), []
        for step in range(STEPS):
            figures = self.figures(rows, order.take(step * BATCH, BATCH).tolist(), learn=True)
            found.append(figures | {"grad_norm": update(self.model, optimizer)})
        # where policy and reference are equal, signs are rounding
        found[0].pop("accuracy")
        return found, self.model.state_dict()


def test_two_processes_equal_plain_torch(overrides, world, tmp_path):
    """ZeRO-2 with the start model as the reference, ZeRO-3 with another one and weights, both with accumulation."""
    jobs = {}
    for stage, reference, weights in ((2, "model", (1.0, 1.0)), (3, "other", (0.8, 1.5))):
        more = {"kto.desirable_weight": weights[0], "kto.undesirable_weight": weights[1]}
        if reference != "model":
            more["kto.reference"] = world / reference
        arguments = steps(overrides, tmp_path / f"zero{stage}", zero=stage, **{"train.accumulation_steps": 2}, **more)
        hand = ByHand(world, reference, True, *weights)
        jobs[stage] = hand, start("forked", arguments, DS_LLM_CACHE=str(tmp_path / "cache"))
    rows, held_out = read(world / "train.jsonl"), read(world / "val.jsonl")
    for stage, (hand, job) in jobs.items():
        out, err = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, out[-3000:] + err[-3000:]
        assert err.strip() == "", err
        before, after = of_kind(metrics.read(tmp_path / f"zero{stage}" / "metrics.jsonl"), "eval")
        begun = hand.figures(held_out, range(len(held_out)))
        if stage == 3:
            assert {n: before[n] for n in begun} == pytest.approx(begun, rel=1e-5, abs=1e-5) and begun["kl"] > 0
        same(tmp_path / f"zero{stage}", *hand.train(rows))
        ended = hand.figures(held_out, range(len(held_out)))
        assert {n: after[n] for n in ended} == pytest.approx(ended, rel=1e-3, abs=1e-3)


def test_one_process_equals_plain_torch_whatever_the_micro_batch(overrides, world, tmp_path):
    """16 x 1 without the KL term; with it, 16 x 1 and micro-batches of one answer."""
    hand = ByHand(world, "model", False, 1.0, 1.0)
    run(*steps(overrides, tmp_path / "off", **{"kto.kl": False, "train.batch_size": 16}), "data.val=[]")
    same(tmp_path / "off", *hand.train(read(world / "train.jsonl")))
    found = []
    for size in (1, 16):
        split = {"train.batch_size": size, "train.accumulation_steps": 16 // size}
        found.append(of_kind(run(*steps(overrides, tmp_path / str(size), **split), "data.val=[]"), "step"))
    for one, other in zip(*found, strict=True):
        for name in ("loss", "grad_norm", *kto.METRICS):
            if (one["step"], name) != (1, "accuracy"):  # signs of rounding
                assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    assert found[0][-1]["kl"] != 0


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["lora.enabled=true"]])
def test_begins_at_the_reference_and_learns_the_preference(overrides, tmp_path, more):
    arguments = ["train.max_steps=7", "optim.lr=5e-3", "tracking.report=true", "eval.max_windows=8"]
    records = run(*overrides, *arguments, *more)
    first, last = of_kind(records, "eval")[0], of_kind(records, "eval")[-1]
    step = of_kind(records, "step")[0]
    for figures in (first, step):  # the very same numbers: reference and adapters off are the start model
        assert figures["loss"] == pytest.approx(0.5, rel=1e-7)
        assert (figures["margin"], figures["accuracy"], figures["kl"]) == (0, 0.5, 0)
    assert first["goal"] == "loss" and last["answers"] == 8
    assert last["accuracy"] > 0.7 and last["margin"] > 0.05 and last["best_loss"] == last["loss"] < 0.49, last
    page = (tmp_path / "run" / "report.html").read_text()
    for title in ("Rewards and their margin", "Preference accuracy on the evaluation set", "Reference point"):
        assert title in page
    assert ("undesirable" in page) and ("rejected" not in page)


def test_experts_whole_and_shared(overrides, world, tmp_path):
    """Two processes: ZeRO-3, and ZeRO-2 with experts that the processes share."""
    jobs, found = [], []
    for name, more in (("whole", {"zero": 3}), ("shared", {"zero": 2, "parallel.expert": 2})):
        arguments = steps(overrides, tmp_path / name, **{"model.path": world / "moe"}, **more)
        jobs.append(start("forked", [*arguments, "data.val=[]"], DS_LLM_CACHE=str(tmp_path / f"cache_{name}")))
    for name, job in zip(("whole", "shared"), jobs, strict=True):
        out, err = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, out[-3000:] + err[-3000:]
        found.append(of_kind(metrics.read(tmp_path / name / "metrics.jsonl"), "step"))
    for whole, shared in zip(*found, strict=True):
        assert np.shape(whole["expert_load"]) == (2, 4)
        for name in ("loss", "margin", "kl", "grad_norm", "aux_loss"):
            assert shared[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-5), name
    assert found[0][0]["loss"] == pytest.approx(0.5, rel=1e-6) and found[0][-1]["margin"] > 0


def test_resumes_bitwise_without_scoring_again(overrides, tmp_path, capsys):
    arguments = [*overrides, "checkpoint.every_steps=3", "eval.every_steps=3", "optim.schedule=constant"]
    run(*arguments, "train.max_steps=6", f"output={tmp_path / 'whole'}")
    run(*arguments, "train.max_steps=3")
    capsys.readouterr()
    run(*arguments, "train.max_steps=6")
    out = capsys.readouterr().out
    assert "all 24 samples found" in out and "all 30 samples found" in out and "continuing from" in out
    one, other = (metrics.deterministic(metrics.read(tmp_path / n / "metrics.jsonl")) for n in ("whole", "run"))
    assert [r for r in one if r["kind"] in ("step", "eval")] == [r for r in other if r["kind"] in ("step", "eval")]
    files = [tmp_path / n / "model" / "model.safetensors" for n in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_recipe_as_it_stands(world, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_LLM_CACHE", str(tmp_path / "cache"))
    recipe = str(ROOT / "ds_configs" / "recipes" / "kto.yaml")
    short = ["data.seq_len=64", "train.max_steps=2", "eval.max_windows=8", f"output={tmp_path / 'run'}"]
    data = [f"data.train=[{world / 'pairs.jsonl'}]", f"data.val=[{world / 'val.jsonl'}]"]
    assert trainer.train(config.load(recipe, [f"model.path={world / 'model'}", *data, *short])) == 0
    found = of_kind(metrics.read(tmp_path / "run" / "metrics.jsonl"), "step")
    assert [r["loss"] for r in found] == pytest.approx([0.5, 0.5], abs=0.05)
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()


# -- rows -------------------------------------------------------------------------------------------------------------


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


GOOD = [
    {"prompt": "say red", "completion": "red", "label": True},
    {"prompt": "say blue", "completion": "green", "label": 0},
    {"prompt": [user("say red")], "completion": [said("blue"), user("no"), said("green")], "label": False},
    {"messages": [user("say"), said("what"), user("name white"), said("white it is")], "label": 1},
    {"prompt": "name black", "chosen": "black it is", "rejected": "red"},
]
ANSWERS = [
    (["red"], True),
    (["green"], False),
    (["blue", "green"], False),
    (["white it is"], True),
    (["black it is"], True),
    (["red"], False),
]
BAD = [
    ("no label", {"prompt": "say red", "completion": "red"}),
    ("no label", {"messages": [user("say red"), said("red")], "label": None}),
    ("bad label", {"prompt": "say red", "completion": "red", "label": "true"}),
    ("bad label", {"prompt": "say red", "completion": "red", "label": 2}),
    ("bad label", {"prompt": "say red", "completion": "red", "label": 0.0}),
    ("bad label", {"prompt": "say red", "completion": "red", "label": [1]}),
    ("empty", {"prompt": "say red", "completion": " ", "label": True}),
    ("missing field", {"text": "red", "label": True}),
    ("missing field", {"completion": "red", "label": True}),
    ("no answer", {"messages": [said("red"), user("say red")], "label": True}),
    ("bad JSON", "{"),
]


def prepare(world, tmp_path, rows, **options):
    source = [str(write(tmp_path / "rows.jsonl", rows))]
    options = {"max_length": 64, "cache": tmp_path / "cache"} | options
    return prepare_labelled(source, load_tokenizer(world / "tokenizer"), **options)


def trained(tokenizer, labels) -> str:
    return tokenizer.decode(labels[labels != -100])


def test_rows_of_all_kinds(world, tmp_path, capsys):
    found = prepare(world, tmp_path, [*GOOD, *(row for _, row in BAD)])
    tokenizer = load_tokenizer(world / "tokenizer")
    assert found.desirable.tolist() == [label for _, label in ANSWERS]
    for i, (texts, _) in enumerate(ANSWERS):
        assert trained(tokenizer, found.sequence(i)[1]) == "".join(f"{text}<|im_end|>" for text in texts)
    expected = {}
    for line, (reason, _) in enumerate(BAD, len(GOOD) + 1):
        entry = expected.setdefault(reason, [0, []])
        entry[0] += 1
        entry[1].append(f"rows.jsonl:{line}")
    assert found.report.dropped == expected
    out = capsys.readouterr().out
    assert "6 answers (3 desirable, 3 not) of 16 rows" in out and "2 no label (rows.jsonl:6, rows.jsonl:7)" in out
    rejects = [json.loads(line) for line in (found.folder / "rejects.jsonl").read_text().splitlines()]
    assert [(r["line"], r["reason"]) for r in rejects] == [(i, reason) for i, (reason, _) in enumerate(BAD, 6)]
    assert "'true'" in rejects[2]["detail"]
    with pytest.raises(UserError, match="no labelled answer to train on; 2 bad label"):
        prepare(world, tmp_path, [BAD[2][1], BAD[3][1]])


def test_mismatched_answers_are_to_other_prompts(world, tmp_path):
    rows = [pair(i) for i in range(30)] + [pair(0) | {"chosen": "green", "rejected": "blue it is"}] * 9
    found = prepare(world, tmp_path, rows)
    tokenizer = load_tokenizer(world / "tokenizer")
    for seed in (0, 7):
        others = found.partners(seed)
        order = SampleOrder(len(found), seed).permutation(0)
        prompts = [rows[i // 2]["prompt"] for i in range(len(found))]
        for place, i in enumerate(order):
            following = [*order[place + 1 :], *order[:place]]
            assert others[i] == next(j for j in following if prompts[j] != prompts[i])
    batch, picks = found.mismatched(range(len(found)), others), range(len(found))
    for i in picks:
        ids, labels, mask = (batch[name][i].numpy() for name in ("input_ids", "labels", "attention_mask"))
        answer = rows[others[i] // 2][SIDES[others[i] % 2 == 0]]
        assert trained(tokenizer, labels) == f"{answer}<|im_end|>"
        text = tokenizer.apply_chat_template([user(prompts[i]), said(answer)], tokenize=False)
        assert tokenizer.decode(ids[mask == 1]) == text[: len(tokenizer.decode(ids[mask == 1]))]
    short = prepare(world, tmp_path, rows, max_length=int(found.lengths.min()))
    assert short.mismatched(picks, short.partners(0))["input_ids"].shape[1] == found.lengths.min() - 1
    with pytest.raises(UserError, match="all answers are to the same prompt"):
        prepare(world, tmp_path, [pair(0)]).partners(0)


def test_what_is_shown_and_said_of_the_balance(overrides, world, capsys):
    def said_of(*more: str) -> str:
        show.show_run(config.load(None, [*overrides, "data.val=[]", *more]), 2)
        return " ".join(capsys.readouterr().out.split())

    out = said_of()
    assert "answer 0, undesirable:" in out and "answer 199, desirable:" in out
    good = sum(i % 3 > 0 for i in range(200))
    low, high = (200 - good) / good, 4 / 3 * (200 - good) / good
    assert f"desirable answers weigh {good} in all, undesirable ones {200 - good}" in out
    assert f"set kto.desirable_weight between {low:.3g} and {high:.3g}" in out
    assert "warning" not in said_of(f"kto.desirable_weight={(low + high) / 2}")
    assert "warning" not in said_of(f"data.train={world / 'pairs.jsonl'}")
    alone = write(world / "alone.jsonl", [row for row in read(world / "train.jsonl") if row["label"]])
    assert f"warning: all {good} training answers are desirable" in said_of(f"data.train={alone}")


def test_refuses_what_cannot_work(overrides, world, tmp_path):
    for wrong, message, kind in (
        ("kto.reference=nowhere/at/all", "nowhere/at/all: no such file", UserError),
        ("model.path=null", "model.path: kto aligns a model", ConfigError),
        ("data.train=[]", "data.train: name the data", ConfigError),
        ("data.format=alpaca", "data.format: is for sft", ConfigError),
        ("kto.beta=0", "kto.beta: 0.0 must be greater than 0", ConfigError),
        (f"data.train={world / 'text.jsonl'}", "no labelled answer to train on; 240 missing field", UserError),
        ("data.seq_len=1000", "more than the model's 64 positions", UserError),
        ("parallel.sequence=2", "not possible with mode=kto", ConfigError),
    ):
        with pytest.raises(kind, match=message):
            run(*overrides, wrong)
    with pytest.raises(ConfigError, match="leaves nothing to learn"):
        run(*overrides, "kto.desirable_weight=0", "kto.undesirable_weight=0")
    assert not (tmp_path / "run").exists()
