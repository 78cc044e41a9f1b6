"""Draws have the distributions that the sweep file asks for, and become values that a run's configuration takes."""

import numpy as np
import pytest
from scipy import stats

from ds_llm.config.run import load
from ds_llm.errors import ConfigError
from ds_llm.sweeps.space import FIELDS, as_text, read_parameters

optuna = pytest.importorskip("optuna")
RANDOM = np.random.default_rng()
DRAWS = 400


def some(distribution: str) -> dict:
    """Random fields for a distribution of numbers."""
    low, mean, q = RANDOM.uniform(0.2, 2), RANDOM.uniform(-1, 1), RANDOM.choice([0.05, 0.25, 1.0])
    fields = FIELDS[distribution]
    found = {"distribution": distribution}
    if "min" in fields:
        found |= {"min": float(low), "max": float(low + RANDOM.uniform(3, 6))}
    if "mu" in fields:
        found |= {"mu": float(mean), "sigma": float(RANDOM.uniform(0.3, 2))}
    if "a" in fields:
        found |= {"a": float(RANDOM.uniform(0.5, 4)), "b": float(RANDOM.uniform(0.5, 4))}
    if "q" in fields:
        found["q"] = float(q)
    return found


def reference(f: dict):
    """The distribution before rounding, by scipy."""
    kind = f["distribution"].removeprefix("q_")
    if kind == "uniform":
        return stats.uniform(f["min"], f["max"] - f["min"])
    if kind.endswith("log_uniform_values"):  # 1/x is log-uniform where x is
        return stats.loguniform(f["min"], f["max"])
    if kind == "log_uniform":
        return stats.loguniform(np.exp(f["min"]), np.exp(f["max"]))
    if kind == "inv_log_uniform":
        return stats.loguniform(np.exp(-f["max"]), np.exp(-f["min"]))
    if kind == "normal":
        return stats.norm(f["mu"], f["sigma"])
    if kind == "log_normal":
        return stats.lognorm(s=f["sigma"], scale=np.exp(f["mu"]))
    return stats.beta(f["a"], f["b"])


def test_draws_follow_their_distributions():
    numbers = [name for name in FIELDS if "values" not in FIELDS[name] and name not in ("constant", "int_uniform")]
    sections = {f"p{i}": some(name) for i, name in enumerate(numbers)}
    weights = RANDOM.dirichlet(np.ones(4))
    sections["weighted"] = {"values": ["a", "b", "c", "d"], "probabilities": weights.tolist()}
    sections["whole"] = {"min": -3, "max": 7}
    sections["nested"] = {"parameters": {"deep": {"parameters": {"x": {"values": [True, None, [1, 2]]}}}}}
    parameters = read_parameters(sections, "file")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=int(RANDOM.integers(2**31))))
    rows = []
    for _ in range(DRAWS):
        trial = study.ask()
        rows.append({name: p.suggest(trial) for name, p in parameters.items()})
        assert rows[-1] == {name: p.suggest(trial) for name, p in parameters.items()}  # asked again: the same
    for i, name in enumerate(numbers):
        f = sections[f"p{i}"]
        drawn, wanted = np.array([float(row[f"p{i}"]) for row in rows]), reference(f)
        if "q" in f:
            q = f["q"]
            steps = drawn / q
            assert np.allclose(steps, np.round(steps), atol=1e-3), name
            # a multiple of q stands for all values that round to it
            drawn = (np.round(steps) + RANDOM.uniform(-0.5, 0.5, DRAWS)) * q
            cdf = lambda x, w=wanted, q=q: _rounded_cdf(x, w, q)  # noqa: E731
        else:
            cdf = wanted.cdf
        assert stats.kstest(drawn, cdf).pvalue > 1e-6, (name, f)
    counts = [sum(row["weighted"] == v for row in rows) for v in "abcd"]
    assert stats.chisquare(np.add(counts, 0.5), weights * (DRAWS + 2) + 1e-9).pvalue > 1e-9 or min(weights) < 0.02
    assert {row["whole"] for row in rows} == {str(i) for i in range(-3, 8)}
    assert {row["nested.deep.x"] for row in rows} == {"true", "null", "[1, 2]"}


def _rounded_cdf(x, wanted, q):
    """Distribution function of round(X / q) * q spread evenly over the cell that rounds to it."""
    cell = np.floor(x / q + 0.5)
    below, above = wanted.cdf((cell - 0.5) * q), wanted.cdf((cell + 0.5) * q)
    return below + (above - below) * (x / q + 0.5 - cell)


def test_a_grid_has_every_value_once():
    sections = {
        "a": {"values": ["x", 1.5, False]},
        "b": {"min": 2, "max": 4},
        "c": {"distribution": "q_uniform", "min": 0.0, "max": 0.3, "q": 0.1},
        "d": {"value": 7},
    }
    found = {name: p.grid() for name, p in read_parameters(sections, "file").items()}
    assert found == {"a": ["x", "1.5", "false"], "b": ["2", "3", "4"], "c": ["0", "0.1", "0.2", "0.3"], "d": ["7"]}


@pytest.mark.parametrize(
    "key, value",
    [
        ("optim.betas", [0.9, 0.999]),
        ("model.n_kv_heads", None),
        ("ema.enabled", True),
        ("optim.lr", 3e-7),
        ("lora.targets", ["q_proj", "v_proj"]),
        ("data.tokenizer", "a folder/with = signs"),
    ],
)
def test_a_value_survives_the_command_line(key, value):
    found = load(None, [f"{key}={as_text(value)}"])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    "section, text",
    [
        ({}, "must map configuration keys"),
        ({"a": 3}, "a: must be a mapping"),
        ({"a": {"distribution": "log_uniform_value", "min": 1, "max": 2}}, "did you mean 'log_uniform_values'?"),
        ({"a": {"min": 1.0}}, "uniform needs 'max'"),
        ({"a": {"min": 1, "max": 2, "step": 1}}, "int_uniform has no 'step'; it takes min, max"),
        ({"a": {"min": 3, "max": 2}}, "min 3 must be less than max 2"),
        ({"a": {"min": "x", "max": 2}}, "min: 'x' is not a number"),
        ({"a": {"distribution": "log_uniform_values", "min": 0, "max": 2}}, "must be greater than 0"),
        ({"a": {"distribution": "int_uniform", "min": 0.5, "max": 2}}, "needs whole numbers"),
        ({"a": {"distribution": "normal", "sigma": 0}}, "sigma: 0 must be greater than 0"),
        ({"a": {"values": []}}, "at least one value"),
        ({"a": {"values": [1, 1]}}, "1 is there twice"),
        ({"a": {"values": [1, 2], "probabilities": [0.5]}}, "a number of at least 0 for each value"),
        ({"a": {"values": [1, 2], "probabilities": [0.5, 0.6]}}, "1 in all"),
        ({"a": {"parameters": {}}}, "must map configuration keys"),
    ],
)
def test_mistakes_are_one_line(section, text):
    with pytest.raises(ConfigError) as error:
        read_parameters(section, "sweep.yaml: parameters")
    assert text in str(error.value) and str(error.value).startswith("sweep.yaml: parameters")
    assert "\n" not in str(error.value)
