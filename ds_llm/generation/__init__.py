"""Text from a model: one prompt, chats, files of prompts."""

NAMES = ("Completion", "Generator", "Prompt", "SamplingParams")  # the Python API, see docs/generation.md


def __getattr__(name: str):
    """The names of the Python API, imported on first use: the options alone need no transformers."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ds_llm.generation import generator

    return getattr(generator, name)
