"""Architectures, and what they share: output head, experts, gates, kernels in models of transformers."""


def __getattr__(name: str):
    # transformers' model files are only read when a model is to be changed
    if name == "accelerate":
        from ds_llm.models.hf_kernels import accelerate

        return accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
