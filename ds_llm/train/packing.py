"""Whether a run's model keeps packed documents apart: checked before it is loaded, prepared once it is."""

from __future__ import annotations

from torch import nn

from ds_llm.config.run import Config
from ds_llm.engine import processes
from ds_llm.models.documents import parts
from ds_llm.models.isolation import find_way, isolate
from ds_llm.pretrained.architecture import architecture
from ds_llm.pretrained.loading import TORCH_DTYPES, architectures, attention_kernel, supported_attention
from ds_llm.progress import console


def check_packing(config: Config) -> None:
    """Raise `ds_llm.models.isolation.LeakError` where packed documents would see each other in the run's model."""
    dtype = config.train.dtype
    kernel = attention_kernel(config.model.attention, dtype)
    for found in architectures(config.model.path) if config.model.path is not None else [architecture(config)]:
        supported = supported_attention(found, config.model.attention, kernel)
        find_way(found, supported, processes.device(), TORCH_DTYPES[dtype])


def keep_apart(config: Config, model: nn.Module) -> None:
    """Prepare a loaded model for packed documents, and say how it keeps them apart."""
    isolate(model, processes.device(), TORCH_DTYPES[config.train.dtype])
    ways = dict.fromkeys(str(part.packing_way) for part in parts(model))
    console.print(f"packed documents: {'; '.join(ways)}")
