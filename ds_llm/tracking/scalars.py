"""The numbers of a record, as TensorBoard and Weights & Biases take them."""

from __future__ import annotations


def scalars(prefix: str, r: dict) -> dict[str, float]:
    """The numbers of a step or eval record, by `prefix/name`, with the spread of the expert load as one number."""
    found = {
        name: float(value)
        for name, value in r.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in ("step", "time", "eta")
    }
    if r.get("skipped"):
        found["skipped"] = 1.0
    if r.get("expert_load"):
        # 1 when balanced, the number of experts when one gets all
        found["expert_imbalance"] = max(max(layer) * len(layer) / max(sum(layer), 1e-20) for layer in r["expert_load"])
    return {f"{prefix}/{name}": value for name, value in found.items()}
