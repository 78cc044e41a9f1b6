"""The keys of the section `parallel` of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from ds_llm.config.options import key


@dataclass
class ParallelConfig:
    expert: int = key(
        1, "Processes that share the experts of every layer; each holds its part of them, and tokens travel", at_least=1
    )
    sequence: int = key(
        1, "Processes that share the rows of a micro-batch; each computes on its part of every row's tokens", at_least=1
    )
    tensor: int = key(
        1, "Processes that share every attention and MLP layer; each holds a slice of its weights", at_least=1
    )
