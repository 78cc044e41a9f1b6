"""Settings for decoders of common sizes on common cards: the table of docs/memory.md.

python -m ds_llm.memory.presets
"""

from __future__ import annotations

from ds_llm.config.run import load
from ds_llm.memory.plan import GB, HEADROOM, Planner, choose, overrides

ROWS, LENGTH = 4, 4096  # the largest micro-batch asked for, and its tokens per row
CARDS, WORLDS = (16, 24, 40, 80), (1, 8, 64)  # GiB of a card, number of cards
MODELS = {  # the shapes of Llama 3.2 1B, Llama 2 7B and Llama 3 70B
    "1B": {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "intermediate_size": 8192,
           "vocab_size": 128256},
    "7B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "intermediate_size": 11008,
           "vocab_size": 32000, "tie_embeddings": "false"},
    "70B": {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "intermediate_size": 28672,
            "vocab_size": 128256, "tie_embeddings": "false"},
}  # fmt: skip


def arguments(model: str) -> list[str]:
    """The `key=value` of training a model of `MODELS` whole, in bf16."""
    shape = [f"model.{name}={value}" for name, value in MODELS[model].items()]
    return [*shape, f"model.max_seq_len={LENGTH}", "train.dtype=bf16", f"train.batch_size={ROWS}"]


def rows(model: str) -> list[tuple[str, ...]]:
    """(model, cards, GiB of a card, settings, GB of a card in use, GB of host memory per process) in words."""
    config = load(None, arguments(model))
    found, passes = [], {}
    for world in WORLDS:
        for size in CARDS:
            planner = Planner(config, world, touched=False)
            planner.passes = passes  # what a pass takes depends on neither
            chosen = choose(planner, size * 2**30)
            if chosen is None:
                found.append((model, str(world), str(size), "does not fit", "", ""))
                continue
            setting, smaller = chosen
            estimate = smaller.estimate(setting)
            assert estimate.total <= size * 2**30 * HEADROOM
            host = f"{estimate.host / GB:,.0f}" if estimate.host else ""
            found.append(
                (
                    model,
                    str(world),
                    str(size),
                    f"`{overrides(setting, smaller.config)}`",
                    f"{estimate.total / GB:.1f}",
                    host,
                )
            )
    return found


def line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


if __name__ == "__main__":
    for name in MODELS:
        for cells in rows(name):
            print(line(cells))
