"""The parameters of a sweep file: values of configuration keys, and how they are drawn.

The distributions are those of W&B's sweep files (https://docs.wandb.ai/models/sweeps/sweep-config-keys). Optuna draws
numbers uniformly, on a line or a logarithmic one; what it lacks (normal, beta, values with probabilities) is drawn as a
quantile between 0 and 1 and mapped by the inverse of the distribution function.
"""

from __future__ import annotations

import bisect
import difflib
import itertools
import json
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from ds_llm.errors import ConfigError

# the fields of each distribution; None: must be given
_ENDS = {"min": None, "max": None}
_BELL = {"mu": 0.0, "sigma": 1.0}
_BETA = {"a": 1.0, "b": 1.0}
_STEP = {"q": 1.0}
FIELDS: dict[str, dict[str, Any]] = {
    "constant": {"value": None},
    "categorical": {"values": None},
    "categorical_w_probabilities": {"values": None, "probabilities": None},
    "int_uniform": _ENDS,
    "uniform": _ENDS,
    "q_uniform": _ENDS | _STEP,
    "log_uniform": _ENDS,
    "log_uniform_values": _ENDS,
    "inv_log_uniform": _ENDS,
    "inv_log_uniform_values": _ENDS,
    "q_log_uniform": _ENDS | _STEP,
    "q_log_uniform_values": _ENDS | _STEP,
    "normal": _BELL,
    "q_normal": _BELL | _STEP,
    "log_normal": _BELL,
    "q_log_normal": _BELL | _STEP,
    "beta": _BETA,
    "q_beta": _BETA | _STEP,
}
DISCRETE = ("constant", "categorical", "categorical_w_probabilities", "int_uniform", "q_uniform")  # what a grid takes
EDGE = 1e-6  # quantiles stay this far from 0 and 1, where a normal distribution is infinite


@dataclass(frozen=True)
class Parameter:
    """One key of the run's configuration and its distribution; `fields` as in the sweep file, defaults filled in."""

    name: str
    distribution: str
    fields: dict[str, Any]

    @property
    def varies(self) -> bool:
        return self.distribution != "constant" and len(self.fields.get("values", (0, 0))) > 1

    @property
    def logarithmic(self) -> bool:
        return "log_" in self.distribution

    def suggest(self, trial) -> str:
        """The value of an Optuna trial, in the form for `name=`. A second call returns the same value."""
        if not self.varies:
            return as_text(self.fields["value"] if self.distribution == "constant" else self.fields["values"][0])
        if self.distribution == "categorical":
            return trial.suggest_categorical(self.name, self.grid())
        if self.distribution == "int_uniform":
            return str(trial.suggest_int(self.name, *self.ends()))
        if {"min", "max"} <= self.fields.keys():
            low, high = self.ends()
            return self._number(trial.suggest_float(self.name, low, high, log=self.logarithmic))
        return self.at(trial.suggest_float(self.name, 0.0, 1.0))

    def ends(self) -> tuple[float, float]:
        """Lowest and highest value of a distribution that has them, before rounding to multiples of q."""
        low, high = self.fields["min"], self.fields["max"]
        if self.distribution in ("log_uniform", "q_log_uniform"):
            return math.exp(low), math.exp(high)
        if self.distribution == "inv_log_uniform":
            return math.exp(-high), math.exp(-low)
        return low, high

    def at(self, quantile: float) -> str:
        """The value below which a share `quantile` of a normal, beta or weighted distribution lies."""
        f = self.fields
        if self.distribution == "categorical_w_probabilities":
            sums = list(itertools.accumulate(f["probabilities"]))
            return as_text(f["values"][min(bisect.bisect_right(sums, quantile * sums[-1]), len(sums) - 1)])
        quantile = min(max(quantile, EDGE), 1 - EDGE)
        if self.distribution.endswith("beta"):
            from scipy.stats import beta  # takes a second

            return self._number(float(beta.ppf(quantile, f["a"], f["b"])))
        found = NormalDist(f["mu"], f["sigma"]).inv_cdf(quantile)
        return self._number(math.exp(found) if self.logarithmic else found)

    def grid(self) -> list[str]:
        """All values of a distribution in `DISCRETE`."""
        if self.distribution == "constant":
            return [as_text(self.fields["value"])]
        if "values" in self.fields:
            return [as_text(value) for value in self.fields["values"]]
        low, high = self.ends()
        if self.distribution == "int_uniform":
            return [str(value) for value in range(low, high + 1)]
        q = self.fields["q"]
        return [self._number(i * q) for i in range(round(low / q), round(high / q) + 1)]

    def examples(self) -> list[str]:
        """Values for a check of the distribution: all of a list, both ends of a range, the median of others."""
        if self.distribution in ("constant", "categorical", "categorical_w_probabilities"):
            return self.grid()
        if {"min", "max"} <= self.fields.keys():
            return [str(end) if self.distribution == "int_uniform" else self._number(end) for end in self.ends()]
        return [self.at(0.5)]

    @property
    def whole(self) -> bool:
        """Whether all values are whole numbers, of a distribution of numbers."""
        return self.distribution == "int_uniform" or float(self.fields.get("q", 0.5)).is_integer()

    def _number(self, value: float) -> str:
        if "q" in self.fields:
            value = round(value / self.fields["q"]) * self.fields["q"]
        return str(round(value)) if self.whole else f"{value:.6g}"


def as_text(value) -> str:
    """A value in the form for `key=` on the command line of `launch/train.py`."""
    return value if isinstance(value, str) else json.dumps(value)


def read_parameters(section, where: str, prefix: str = "") -> dict[str, Parameter]:
    """The `parameters` of a sweep file, by configuration key; nested ones get dotted names. `where` begins errors."""
    if not isinstance(section, dict) or not section:
        raise ConfigError(
            f"{where}: must map configuration keys to their values, for example optim.lr: {{value: 1e-3}}"
        )
    found = {}
    for name, given in section.items():
        name = f"{prefix}{name}"
        if isinstance(given, dict) and "parameters" in given:
            found |= read_parameters(given["parameters"], where, f"{name}.")
        else:
            found[name] = _read(name, given, f"{where}: {name}")
    return found


def _read(name: str, given, where: str) -> Parameter:
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: must be a mapping with value, values, or min and max")
    given = dict(given)
    distribution = given.pop("distribution", None) or _default(given)
    if distribution not in FIELDS:
        near = difflib.get_close_matches(str(distribution), FIELDS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(FIELDS)}"
        raise ConfigError(f"{where}: distribution: unknown '{distribution}'{hint}")
    wanted = FIELDS[distribution]
    for field in given:
        if field not in wanted:
            raise ConfigError(f"{where}: {distribution} has no '{field}'; it takes {', '.join(wanted)}")
    for field, default in wanted.items():
        if field not in given:
            if default is None:
                raise ConfigError(f"{where}: {distribution} needs '{field}'")
            given[field] = default
    _check(distribution, given, where)
    return Parameter(name, distribution, given)


def _default(given: dict) -> str:
    if "value" in given:
        return "constant"
    if "values" in given:
        return "categorical_w_probabilities" if "probabilities" in given else "categorical"
    return "int_uniform" if all(type(given.get(end)) is int for end in ("min", "max")) else "uniform"


def _check(distribution: str, given: dict, where: str) -> None:
    numbers = {k: v for k, v in given.items() if k not in ("value", "values", "probabilities")}
    for field, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"{where}: {field}: {value!r} is not a number")
        if field in ("q", "sigma", "a", "b") and value <= 0:
            raise ConfigError(f"{where}: {field}: {value} must be greater than 0")
    if "values" in given:
        values = given["values"]
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: values: must be a list with at least one value")
        texts = [as_text(value) for value in values]
        if len(set(texts)) < len(texts):
            raise ConfigError(f"{where}: values: {next(t for t in texts if texts.count(t) > 1)} is there twice")
    if "probabilities" in given:
        shares = given["probabilities"]
        sound = isinstance(shares, list) and all(isinstance(p, (int, float)) and p >= 0 for p in shares)
        if not sound or len(shares) != len(given["values"]) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise ConfigError(f"{where}: probabilities: must be a number of at least 0 for each value, 1 in all")
    if "min" in given:
        if given["min"] >= given["max"]:
            raise ConfigError(f"{where}: min {given['min']} must be less than max {given['max']}")
        if distribution.endswith("log_uniform_values") and given["min"] <= 0:
            raise ConfigError(f"{where}: min: {given['min']} must be greater than 0 for {distribution}")
        if distribution == "int_uniform" and any(type(given[end]) is not int for end in ("min", "max")):
            raise ConfigError(f"{where}: int_uniform needs whole numbers for min and max")
