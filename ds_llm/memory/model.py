"""The model of a run without its weights: their numbers, which of them are trained, and the shape of a batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from ds_llm.config.modes import MODES
from ds_llm.config.run import Config
from ds_llm.errors import ConfigError
from ds_llm.models.parameters import hidden_matrices
from ds_llm.pretrained.lengths import lengths

NF4_BYTES = 0.5 + 4 / 64  # of a weight: 4 bits, and an fp32 scale for each block of 64


@dataclass(frozen=True)
class Outline:
    """The model that a run trains.

    Numbers of weights are those of one process before ZeRO: of the whole model, or of a part with `parallel.expert` or
    `parallel.tensor`.

    config: of transformers. make: builds the module of such a configuration, as the run does. trained, frozen: weights
    with and without gradients. frozen_bytes: mean bytes of a frozen weight. masks: bytes of a sparse model's masks.
    expanded: weights of the largest sparse layer, which is dense during its product. shared: trained weights of experts
    that processes share. whole: weights of the whole model where they are not trained + frozen. muon: share of the
    trained weights that Muon would train.
    """

    config: object
    make: Callable[[object], nn.Module]
    trained: int
    frozen: int
    frozen_bytes: float
    masks: int = 0
    expanded: int = 0
    shared: int = 0
    whole: int | None = None
    muon: float = 0.0

    @property
    def parameters(self) -> int:
        return self.trained + self.frozen if self.whole is None else self.whole


def outline(config: Config) -> Outline:
    """The outline of a run's model, on torch's meta device. Raises `ConfigError` where its size is unknown."""
    architecture, make = _architecture(config)
    with torch.device("meta"):
        model = make(architecture)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained, frozen = sum(n for n, learns in sizes if learns), sum(n for n, learns in sizes if not learns)
    low = 4 if config.train.dtype == "fp32" else 2
    if MODES[config.mode].compact:
        return _sparse(config, architecture, make, model, low)
    quantized = 0
    if config.lora.enabled and config.lora.quantize != "none":
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]
        quantized = sum(m.weight.numel() for m in linear if not m.weight.requires_grad)
    held = quantized * NF4_BYTES + (frozen - quantized) * low
    muon = sum(p.numel() for p in hidden_matrices(model)) / trained if trained else 0.0
    found = Outline(architecture, make, trained, frozen, held / frozen if frozen else low, muon=muon)
    return _part(found, config, model)


def _part(found: Outline, config: Config, model: nn.Module) -> Outline:
    """The outline of one process's part with expert or tensor parallelism."""
    parallel = config.parallel
    if parallel.expert > 1:
        experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
        mine = experts // parallel.expert
        return replace(found, trained=found.trained - experts + mine, shared=mine, whole=found.parameters)
    if parallel.tensor > 1:
        narrow = copy.deepcopy(found.config)
        text, size = narrow.get_text_config(), parallel.tensor
        text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            setattr(text, name, getattr(text, name) // size)
        with torch.device("meta"):
            mine = sum(p.numel() for p in found.make(narrow).parameters())
        return replace(found, config=narrow, trained=mine, whole=found.parameters)
    return found


def _architecture(config: Config) -> tuple[object, Callable]:
    from ds_llm.models.head import attach_loss_head
    from ds_llm.pretrained import lora as adapters
    from ds_llm.pretrained.architecture import architecture as architecture_of
    from ds_llm.pretrained.architecture import build_model

    found = architecture_of(config, vocab_size=_vocabulary(config) if config.model.path is None else None)
    lora = config.lora if config.lora.enabled and not MODES[config.mode].compact else None

    def make(architecture) -> nn.Module:
        model = build_model(config, architecture, torch.get_default_dtype())
        if config.train.kernels:
            from ds_llm.models import accelerate

            accelerate(model)
        attach_loss_head(model)
        if lora is not None:
            tokens = bool(config.model.add_tokens)
            return adapters.add_adapter(model, lora, config.model.path, config.model.freeze, tokens)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if any(name == start or name.startswith(f"{start}.") for start in config.model.freeze):
                parameter.requires_grad_(False)
        return model

    return found, make


def _vocabulary(config: Config) -> int:
    from pathlib import Path

    from ds_llm.data.tokens import TokenFile
    from ds_llm.pretrained.loading import load_tokenizer

    if config.model.vocab_size:
        return config.model.vocab_size
    files = [path for path in config.data.train if path.endswith(".bin") and Path(path).is_file()]
    source = config.data.tokenizer or (TokenFile(files[0]).tokenizer_path if files else None)
    if source is None:
        raise ConfigError("model.vocab_size: say it, or name data.tokenizer: there is no token file to take it from")
    return len(load_tokenizer(source))


def _sparse(config: Config, architecture, make, model: nn.Module, low: int) -> Outline:
    from ds_llm.sparsity.targets import prunable

    if config.sparse.density is None:
        raise ConfigError("sparse.density: say which share of the weights is kept, to plan for it")
    weights = [target.weight.numel() for target in prunable(model)]
    kept, whole = round(sum(weights) * config.sparse.density), sum(weights)
    dense = sum(p.numel() for p in model.parameters()) - whole
    masks = whole // 8 + (0 if torch.cuda.is_available() else 4 * kept)  # bits; positions are held on CPUs only
    if config.lora.enabled:
        layers = [t for t in prunable(model) if t.kind == "linear"]
        adapters = sum(config.lora.r * sum(t.weight.shape) for t in layers)
        return Outline(architecture, make, adapters, kept + dense, low, masks, max(weights))
    frozen = 0 if config.sparse.train_dense else dense
    return Outline(architecture, make, kept + dense - frozen, frozen, low, masks, max(weights))


def micro_batch(config: Config) -> tuple[int, int]:
    """(rows, tokens of a row) of a forward pass. A pair is two rows, the chosen and the rejected answer. With
    `parallel.sequence` tokens of a process's part of the row."""
    length, _ = lengths(config)
    length = math.ceil(length / config.parallel.sequence)
    mode = MODES[config.mode]
    if mode.groups and not config.data.packing:
        tokens = config.data.tokens_per_batch or 4 * length
        return math.ceil(tokens / length), length
    return config.train.batch_size * mode.rows_per_sample, length
