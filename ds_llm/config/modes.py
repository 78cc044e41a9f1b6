"""The registry of training modes: what other modules need to know of each.

A mode is an entry here and a module `ds_llm.train.modes.NAME`. No other module compares names of modes. This file
imports nothing, so that reading a configuration stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Figure(NamedTuple):
    """A figure of steps that the console shows: its name in the records, what it is called there, its format."""

    name: str
    label: str
    format: str


class Curves(NamedTuple):
    """A plot of the report: title, unit, its lines as {figure: label}; of the evaluations instead of the steps."""

    title: str
    unit: str
    lines: Mapping[str, str]
    evaluations: bool = False


@dataclass(frozen=True)
class Mode:
    """One mode.

    goal: the figure of an evaluation that a sweep compares trials by unless it says another; evaluated: what is
    measured on data.val beside the figures that the module's `figures(config)` names, which it has where own_figures.
    holds_out: evaluates on samples that it holds out of data.train, so without data.val too. subset: takes
    `data.subset_ratio`. freezes: takes `model.freeze`. shown: whether `prepare.py show` prints its samples, as the
    module's `shown(data)` gives them. refuses: features of `ds_llm.parallel.compatibility` that it does not go with,
    each with the reason. console and curves: which figures of its own are shown, and how.

    For the planner: rows that a sample takes; positions: whether a batch has `position_ids`; groups: whether
    data.packing=false makes batches of similar length; compact: whether pruned weights are not held.
    """

    name: str
    goal: str = "perplexity"
    evaluated: tuple[str, ...] = ("perplexity", "loss")
    own_figures: bool = False
    holds_out: bool = False
    subset: bool = False
    freezes: bool = True
    shown: bool = False
    rows_per_sample: int = 1
    positions: bool = True
    groups: bool = False
    compact: bool = False
    refuses: Mapping[str, str] = field(default_factory=dict)
    console: tuple[Figure, ...] = ()
    curves: tuple[Curves, ...] = ()


OF_WHOLE_ANSWERS = {
    "tensor": "its reference scores rows on every rank for itself",
    "sequence": "its losses are of whole answers, not of tokens",
}
PREFERRED = (Figure("margin", "margin", "+.3f"), Figure("accuracy", "acc", ".1%"))


def accuracy(unit: str) -> tuple[Curves, Curves]:
    """Plots of how often the preferred is preferred."""
    return (
        Curves("Preference accuracy on the evaluation set", unit, {"accuracy": "accuracy"}, evaluations=True),
        Curves("Preference accuracy of the batch", unit, {"accuracy": "accuracy"}),
    )


def rewards(sides: Mapping[str, str]) -> Curves:
    """Plot of the rewards of both sides and of what lies between them."""
    return Curves("Rewards and their margin", "reward", {**sides, "margin": "margin"})


MODES = {
    mode.name: mode
    for mode in (
        Mode("pretrain", own_figures=True),
        Mode("sft", shown=True, groups=True),
        Mode(
            "dpo",
            goal="loss",
            evaluated=(),
            own_figures=True,
            shown=True,
            rows_per_sample=2,
            positions=False,
            refuses=OF_WHOLE_ANSWERS,
            console=PREFERRED,
            curves=(
                *accuracy("share of the pairs"),
                rewards({"reward_chosen": "chosen", "reward_rejected": "rejected"}),
            ),
        ),
        Mode(
            "kto",
            goal="loss",
            evaluated=(),
            own_figures=True,
            shown=True,
            positions=False,
            refuses=OF_WHOLE_ANSWERS,
            console=(*PREFERRED, Figure("kl", "kl", ".3f")),
            curves=(
                *accuracy("share of the answers"),
                rewards({"reward_desirable": "desirable", "reward_undesirable": "undesirable"}),
                Curves("Reference point", "KL estimate, nats", {"kl": "kl"}),
            ),
        ),
        Mode(
            "sparse",
            freezes=False,
            compact=True,
            refuses={
                "tensor": "compact weights have no rows and columns to slice",
                "expert": "compact experts have no rows to hand out",
            },
        ),
        Mode(
            "router",
            own_figures=True,
            holds_out=True,
            subset=True,
            positions=False,
            refuses={
                "tensor": "its models have experts; use zero=3",
                "expert": "its experts are frozen, and DeepSpeed shares only trained ones; use zero=3",
                "sequence": "its losses are of whole rows, not of tokens",
            },
            console=(Figure("quality_loss", "quality", ".4f"),),
        ),
    )
}


def console_figures() -> list[Figure]:
    """The figures of all modes that the console shows where a record has them, each once."""
    return list(dict.fromkeys(figure for mode in MODES.values() for figure in mode.console))


def names(feature: str) -> str:
    """The modes that have a feature, a field of `Mode`: "sft and dpo"."""
    *most, last = (name for name, mode in MODES.items() if getattr(mode, feature))
    return f"{', '.join(most)} and {last}" if most else last
