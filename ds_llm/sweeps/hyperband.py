"""Early stopping of bad trials, by the `early_terminate` section of a W&B sweep file.

W&B's `hyperband` is asynchronous successive halving (Li et al. 2018, arXiv:1810.05934): at certain iterations, the
bands, a trial continues only if it is among the best 1/eta of all trials that reached this band. An iteration is one
value of the metric. Optuna's pruners have other bands (powers of a first one, without `max_iter` and `s`) and no
`strict`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_llm.errors import ConfigError

KEYS = ("type", "min_iter", "max_iter", "s", "eta", "strict")


@dataclass(frozen=True)
class Hyperband:
    """Bands at min_iter * eta^k for all k, or at max_iter / eta^k for k = 1 .. s.

    strict: compare the value of a trial at each band, as in the paper; false: compare its best value so far.
    """

    min_iter: int | None
    max_iter: int | None
    s: int | None
    eta: float
    strict: bool

    def bands(self, iterations: int) -> list[int]:
        """The bands that a trial with so many iterations has reached, ascending."""
        if self.max_iter is not None:
            found = {int(self.max_iter / self.eta**k) for k in range(1, self.s + 1)}
        else:
            found, band = set(), float(self.min_iter)
            while int(band) <= iterations:
                found.add(int(band))
                band *= self.eta
        return sorted(band for band in found if 1 <= band <= iterations)

    def verdict(self, own: dict[int, float], others: list[dict[int, float]], minimize: bool) -> str | None:
        """The reason to end a trial, or None.

        own, others: values of the metric by iteration (from 1), of this trial and of all others, ended or not; values
        at bands must be there, others may be missing.
        """
        reached = self.bands(max(own, default=0))
        if not reached:
            return None
        sign, band = (1 if minimize else -1), reached[-1]
        if band not in own:
            return None
        rivals = sorted(sign * values[band] for values in (own, *others) if band in values)
        threshold = rivals[int(len(rivals) / self.eta)]
        found = sign * own[band] if self.strict else min(sign * value for value in own.values())
        if found <= threshold:
            return None
        return (
            f"{sign * found:.6g} at iteration {band}, the best 1/{self.eta:g} of {len(rivals)} trials have "
            f"{sign * threshold:.6g} or better"
        )


def read(section, where: str) -> Hyperband:
    """The `early_terminate` section as a rule. Raises `ConfigError`, whose message begins with `where`."""
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: must be a mapping with type: hyperband")
    for name in section:
        if name not in KEYS:
            raise ConfigError(f"{where}: unknown key '{name}'; there are {', '.join(KEYS)}")
    if section.get("type") != "hyperband":
        raise ConfigError(f"{where}: type: {section.get('type')!r} is not hyperband, the only one there is")
    if ("min_iter" in section) == ("max_iter" in section):
        raise ConfigError(f"{where}: needs either min_iter, or max_iter and s")
    if ("s" in section) != ("max_iter" in section):
        raise ConfigError(f"{where}: s: goes with max_iter, how many bands there are below it")
    for name in ("min_iter", "max_iter", "s"):
        if name in section and (type(section[name]) is not int or section[name] < 1):
            raise ConfigError(f"{where}: {name}: {section[name]!r} must be a whole number of at least 1")
    eta, strict = section.get("eta", 3), section.get("strict", True)
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or eta <= 1:
        raise ConfigError(f"{where}: eta: {eta!r} must be a number greater than 1")
    if not isinstance(strict, bool):
        raise ConfigError(f"{where}: strict: {strict!r} must be true or false")
    rule = Hyperband(section.get("min_iter"), section.get("max_iter"), section.get("s"), eta, strict)
    if rule.max_iter is not None and not rule.bands(rule.max_iter):
        raise ConfigError(f"{where}: max_iter {rule.max_iter} / eta {eta:g} leaves no band; raise max_iter")
    return rule
