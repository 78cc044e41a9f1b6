"""DeepSpeed trainer for language models."""


def __getattr__(name: str):
    """`ds_llm.metrics`, the name under which other programs read the metrics file of a run (docs/tracking.md)."""
    if name == "metrics":
        from ds_llm.tracking import metrics_file

        return metrics_file
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
