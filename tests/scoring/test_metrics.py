"""Metrics from given statistics: the arithmetic, the empty cases, the names."""

import itertools
import math

import numpy as np
import pytest
import torch

from ds_llm.errors import UserError
from ds_llm.scoring.metrics import METRICS, Batch, Metric, Sample, cost, create, number, register, sequences

RANDOM = np.random.default_rng()


def sample(ids, scored) -> Sample:
    return Sample(np.array(ids), np.array(scored, dtype=bool))


def batch(counts: list[int]) -> Batch:
    samples = [sample(RANDOM.integers(0, 9, n + 2), [False] + [True] * n + [False]) for n in counts]
    total = sum(counts)
    return Batch(samples, entropy=RANDOM.random(total), logprob=-RANDOM.random(total) * 5)


def test_first_token_never_counts():
    assert sample([5, 6, 7], [True, False, True]).targets.tolist() == [2]
    assert len(sample([5], [True]).targets) == 0 and len(sample([], []).targets) == 0
    with pytest.raises(ValueError, match="expected ids"):
        sample([1, 2], [True])


def test_means_are_over_scored_tokens_of_each_sample():
    found = batch([3, 0, 1, 7])
    edges = np.cumsum([0, 3, 0, 1, 7])
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    row = {}
    for metric in create(["entropy", "logprob", "perplexity"], None):
        row |= metric.measure(found, None)
    for i, part in enumerate(parts):
        if i == 1:
            assert (row["entropy"][1], row["logprob"][1], row["perplexity"][1]) == (0.0, None, None)
            continue
        assert row["entropy"][i] == pytest.approx(found.entropy[part].mean(), rel=1e-6)
        assert row["logprob"][i] == pytest.approx(found.logprob[part].mean(), rel=1e-6)
        assert row["perplexity"][i] == pytest.approx(math.exp(-found.logprob[part].mean()), rel=1e-6)


def test_ifd_is_the_ratio_of_the_losses_of_the_same_tokens():
    (metric,) = create(["ifd"], None)
    with_prompt, alone = batch([4, 0, 2]), batch([4, 0, 2])
    found = metric.measure(with_prompt, alone)["ifd"]
    assert found[1] is None
    assert found[0] == pytest.approx(with_prompt.logprob[:4].mean() / alone.logprob[:4].mean(), rel=1e-6)
    alone.logprob[4:] = 0  # a certain answer: no ratio
    assert metric.measure(with_prompt, alone)["ifd"][2] is None


def test_second_sequence_only_for_metrics_that_need_it():
    row = sample([5, 6, 7, 8, 9], [True, False, True, False, True])
    assert sequences(row, ["entropy"], 1) == [row] and cost(row, ["entropy", "logprob"]) == 5
    _, alone = sequences(row, ["entropy", "ifd"], 1)
    assert alone.input_ids.tolist() == [1, 7, 9] and alone.targets.tolist() == [1, 2]
    assert cost(row, ["ifd"]) == 8


def test_token_mean_leaves_padding_out():
    lengths = [3, 1, 0, 5]
    samples = [sample(range(n), [True] * n) for n in lengths]
    values = torch.from_numpy(RANDOM.random((4 * 6, 2)))
    found = Batch(samples, starts=np.arange(4) * 6).token_mean(values)
    for i, n in enumerate(lengths):
        expected = values[i * 6 : i * 6 + n].mean(0) if n else torch.zeros(2)
        torch.testing.assert_close(found[i], expected.to(found.dtype))


def test_numbers_that_json_can_hold():
    assert number(1 / 3) == 0.3333333 and number(-1234.56789) == -1234.568
    assert number(math.nan) is None and number(math.inf) is None


def test_unknown_and_repeated_metrics_are_refused():
    with pytest.raises(UserError, match="did you mean entropy"):
        create(["entropi"], None)
    for names in (["entropy", "entropy"], []):
        with pytest.raises(UserError, match="once"):
            create(names, None)


def test_a_metric_is_added_by_its_name():
    @register
    class Surprise(Metric):
        """Highest loss of a scored token."""

        name = "surprise"

        def measure(self, batch, unconditional):
            return {"surprise": [number(-part.min()) if len(part) else None for part in batch.split(batch.logprob)]}

    try:
        found = batch([2, 0])
        (metric,) = create(["surprise"], None)
        assert list(metric.columns()) == ["surprise"]
        assert metric.measure(found, None)["surprise"] == [number(-found.logprob.min()), None]
    finally:
        del METRICS["surprise"]
