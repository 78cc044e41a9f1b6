"""The rule that ends trials, against a count of the rivals that are better."""

import numpy as np
import pytest

from ds_llm.errors import ConfigError
from ds_llm.sweeps.hyperband import Hyperband, read

RANDOM = np.random.default_rng()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("minimize", [True, False])
def test_a_trial_goes_on_only_among_the_best(strict, minimize):
    for _ in range(200):
        eta, first = RANDOM.choice([2, 2.5, 3, 4]), int(RANDOM.integers(1, 4))
        rule = Hyperband(first, None, None, float(eta), strict)
        lengths = RANDOM.integers(0, 30, RANDOM.integers(1, 12))
        trials = [dict(enumerate(RANDOM.normal(size=n).round(1).tolist(), 1)) for n in lengths]
        own, others = trials[0], trials[1:]
        bands = [int(first * eta**k) for k in range(10) if int(first * eta**k) <= len(own)]
        assert rule.bands(len(own)) == sorted(set(bands))
        if not bands:
            assert rule.verdict(own, others, minimize) is None
            continue
        there = [t[bands[-1]] for t in trials if len(t) >= bands[-1]]
        value = own[bands[-1]] if strict else (min if minimize else max)(own.values())
        better = sum(v < value if minimize else v > value for v in there)
        reason = rule.verdict(own, others, minimize)
        assert (reason is not None) == (better > int(len(there) / eta)), (own, others, rule)
        if reason:
            assert f"at iteration {bands[-1]}" in reason and f"of {len(there)} trials" in reason


def test_bands_below_a_known_end():
    assert read({"type": "hyperband", "max_iter": 27, "s": 2}, "x").bands(100) == [3, 9]
    assert read({"type": "hyperband", "max_iter": 9, "s": 5, "eta": 3}, "x").bands(100) == [1, 3]
    assert read({"type": "hyperband", "max_iter": 27, "s": 2}, "x").bands(8) == [3]


@pytest.mark.parametrize(
    "section, text",
    [
        ("hyperband", "must be a mapping"),
        ({"type": "median", "min_iter": 1}, "'median' is not hyperband"),
        ({"type": "hyperband"}, "either min_iter, or max_iter and s"),
        ({"type": "hyperband", "min_iter": 1, "max_iter": 9, "s": 1}, "either min_iter"),
        ({"type": "hyperband", "max_iter": 9}, "s: goes with max_iter"),
        ({"type": "hyperband", "min_iter": 0}, "at least 1"),
        ({"type": "hyperband", "min_iter": 1, "eta": 1}, "greater than 1"),
        ({"type": "hyperband", "min_iter": 1, "strict": "yes"}, "must be true or false"),
        ({"type": "hyperband", "max_iter": 2, "s": 1, "eta": 3}, "leaves no band"),
        ({"type": "hyperband", "min_iter": 1, "brackets": 3}, "unknown key 'brackets'"),
    ],
)
def test_mistakes_are_one_line(section, text):
    with pytest.raises(ConfigError, match=r"^sweep\.yaml: early_terminate: ") as error:
        read(section, "sweep.yaml: early_terminate")
    assert text in str(error.value)
