"""What a training run has made, in a form in which two runs can be compared bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ds_llm.engine import resharding as reshard
from ds_llm.tracking import metrics_file as metrics


def trained(out: Path, step: int) -> dict[str, object]:
    """The checkpoint at `step`, the exported model and the figures of every step and evaluation, by name."""
    import ds_llm.engine.engine  # noqa: F401 (DeepSpeed, some of whose classes are in its files)

    last = out / "checkpoints" / f"step-{step:08d}"
    found: dict[str, object] = {"metrics": metrics.deterministic(metrics.read(out / "metrics.jsonl"))}
    for path in sorted(p for place in (last, out / "model") for p in place.rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if path.suffix == ".pt":
            found |= {f"{name}{key}": value for key, value in leaves(reshard.read_file(path))}
        elif path.name == "trainer.json":
            state = json.loads(path.read_text())
            state["config"].pop("output")
            found[name] = state
        elif path.name != "manifest.json":  # checksums of torch's files, whose bytes may differ
            found[name] = path.read_bytes()
    return found


def leaves(value, name: str = ""):
    """Every tensor as bytes and every other value of a nested state, by path."""
    if torch.is_tensor(value):
        yield name, (value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{name}/{key}")
    elif isinstance(value, (int, float, str, bool, type(None))):
        yield name, value
