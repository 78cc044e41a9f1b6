"""Packed documents that do not see each other, in any causal model of transformers.

Inside `apart(...)` three parts of a model know where documents begin: the masks that transformers makes, our attention
kernel, and modules that mix tokens by other means (recurrent layers, convolutions). Those run on each document as a row
of its own. `ds_llm.models.isolation` finds out which of the three a model needs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ds_llm.compat.peft import without_wrapper
from ds_llm.compat.torch import tree_map
from ds_llm.compat.transformers import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    and_masks,
    causal_mask_function,
    choose_attention,
    chosen_attention,
    recompute_inside,
)
from ds_llm.models.attention import document_attention

KERNEL = "ds_llm_documents"  # our attention kernel's name in transformers
MASKED = ("sdpa", "eager", "flex_attention")  # kernels of transformers that read a mask


@dataclass(frozen=True)
class Documents:
    """Where documents lie in the rows [B, S] of a micro-batch.

    bounds: index of each document's first token in the concatenated rows, and B * S at the end. No document crosses
    rows.
    """

    shape: tuple[int, int]
    bounds: tuple[int, ...]
    device: torch.device = field(compare=False)  # DeepSpeed compares what ranks that share layers are given
    _groups: list[Group] = field(default_factory=list, compare=False, repr=False)

    @classmethod
    def of(cls, position_ids: Tensor, device: torch.device | None = None) -> Documents | None:
        """Documents of rows whose position_ids [B, S] restart where one begins; None where each row is one document.

        device: device of the model; None: that of position_ids.
        """
        starts = torch.ones_like(position_ids, dtype=torch.bool)
        starts[:, 1:] = position_ids.diff(dim=-1) != 1
        first = starts.reshape(-1).nonzero().view(-1).tolist()
        if len(first) == position_ids.shape[0]:
            return None
        return cls(tuple(position_ids.shape), (*first, position_ids.numel()), device or position_ids.device)

    @classmethod
    def whole_rows(cls, position_ids: Tensor) -> Documents:
        """Each row [B, S] as a document."""
        rows, length = position_ids.shape
        return cls((rows, length), tuple(range(0, rows * length + 1, length)), position_ids.device)

    def arguments(self) -> dict[str, Tensor | int]:
        """What flash attention of transformers takes: the bounds, int32 [documents + 1], and the longest document."""
        bounds = torch.tensor(self.bounds, dtype=torch.int32, device=self.device)
        longest = max(end - start for start, end in itertools.pairwise(self.bounds))
        return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}

    @property
    def groups(self) -> list[Group]:
        """The documents as padded rows, those of similar length together: each group has less than twice its tokens."""
        if not self._groups:
            alike: dict[int, list[tuple[int, int]]] = {}
            for start, end in itertools.pairwise(self.bounds):
                alike.setdefault((end - start - 1).bit_length(), []).append((start, end))
            self._groups.extend(Group.of(spans, self.device) for spans in alike.values())
        return self._groups

    @property
    def ids(self) -> Tensor:
        """Number of each token's document, int64 [B, S], on the device."""
        lengths = torch.tensor([end - start for start, end in itertools.pairwise(self.bounds)], device=self.device)
        numbers = torch.arange(len(lengths), device=self.device)
        return numbers.repeat_interleave(lengths, output_size=self.bounds[-1]).view(self.shape)


class Group(NamedTuple):
    """Documents as padded rows [D, L]: `take` [D, L] their tokens in all rows laid end to end, the last one repeated as
    padding; `valid` [D, L], False where padding; `tokens` [valid ones] = take[valid]."""

    take: Tensor
    valid: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int]], device: torch.device) -> Group:
        starts, ends = torch.tensor(spans).T[..., None]
        take = starts + torch.arange(int((ends - starts).max()))
        valid = take < ends
        parts = (torch.minimum(take, ends - 1), valid, take[valid])
        return cls(*(part.to(device, non_blocking=True) for part in parts))


@dataclass(frozen=True)
class Way:
    """How a causal language model keeps documents apart.

    kernel: name of the attention kernel for packed rows. modules: class names of modules that run on each document by
    itself.
    """

    kernel: str
    modules: tuple[str, ...] = ()

    @property
    def takes_bounds(self) -> bool:
        """Whether the kernel takes the bounds as arguments of the model."""
        return "flash" in self.kernel

    @property
    def by_document(self) -> bool:
        """Whether nothing is computed between documents, as a mask would have it."""
        return self.kernel == KERNEL or self.takes_bounds

    def __str__(self) -> str:
        attention = f"attention by {self.kernel}" if self.takes_bounds else f"attention under a mask ({self.kernel})"
        if self.kernel == KERNEL:
            attention = "attention document by document"
        return ", ".join([attention, *(f"{name} document by document" for name in self.modules)])


_documents: ContextVar[Documents | None] = ContextVar("documents", default=None)
_ways: ContextVar[Sequence[tuple[nn.Module, Way]]] = ContextVar("ways", default=())


def parts(model: nn.Module) -> list[nn.Module]:
    """The transformers models that a causal language model is made of: itself without adapters, or its sub-models."""
    inner = without_wrapper(model)
    return list(getattr(inner, "sub_models", [inner]))


@contextlib.contextmanager
def apart(ways: Sequence[tuple[nn.Module, Way]], documents: Documents) -> Iterator[None]:
    """Context manager: forward passes of these models keep `documents` apart.

    A later backward pass that computes layers again keeps them apart too.
    """
    before = []
    for model, way in ways:
        for config in _configs(model):
            before.append((config, chosen_attention(config)))
            choose_attention(config, way.kernel)
        recompute_inside(model, _recomputing)
    tokens = _documents.set(documents), _ways.set(ways)
    try:
        yield
    finally:
        for variable, token in zip((_documents, _ways), tokens, strict=True):
            variable.reset(token)
        for config, name in before:
            choose_attention(config, name)


def _configs(model: nn.Module) -> list:
    """The configurations that the model's layers read their attention kernel from."""
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if chosen_attention(config) is not None:
            found[id(config)] = config
    return list(found.values())


def _recomputing() -> tuple:
    """The contexts of a layer's forward pass, and of its repetition in the backward pass."""
    documents = _documents.get()
    again = contextlib.nullcontext() if documents is None else apart(_ways.get(), documents)
    return contextlib.nullcontext(), again


def run_each_apart(module: nn.Module) -> None:
    """Have a module that mixes tokens run on each document as a row of its own, in place.

    It takes and returns tensors [B, S, ...]; padding stands behind a document, where a causal module does not see it.
    Masks [B, 1, S, S] are cut to the document.
    """
    module.__class__ = _by_document(type(module))


@cache
def _by_document(original: type) -> type:
    def forward(self, *args, **kwargs):
        documents = _documents.get()
        if documents is None:
            return original.forward(self, *args, **kwargs)
        given = [_select((args, kwargs), documents.shape, group.take) for group in documents.groups]
        outputs = [original.forward(self, *args, **kwargs) for args, kwargs in given]
        order = torch.cat([group.tokens for group in documents.groups]).argsort()

        def join(*parts):
            shapes = [group.valid.shape for group in documents.groups]
            if not all(isinstance(x, Tensor) and x.shape[:2] == shape for x, shape in zip(parts, shapes, strict=True)):
                return None  # states behind each document
            found = [part[group.valid] for part, group in zip(parts, documents.groups, strict=True)]
            return torch.cat(found)[order].unflatten(0, documents.shape)

        return tuple(map(join, *outputs)) if isinstance(outputs[0], tuple) else join(*outputs)

    # of the same name, so that lists of class names keep working
    attributes = {"forward": forward, "__doc__": original.__doc__, "each_document_apart": True}
    return type(original.__name__, (original,), attributes)


def _select(arguments, shape: tuple[int, int], take: Tensor):
    """Arguments for rows `take` [D, L] instead of rows of `shape`."""
    rows, length = shape

    def select(value):
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[0] not in (1, rows):
            return value
        if value.ndim == 4 and value.shape[1] == 1 and value.shape[2:] == (length, length):
            whole = value.expand(rows, *value.shape[1:])
            return whole[take[:, :1, None] // length, 0, take[:, :, None] % length, take[:, None] % length][:, None]
        if value.shape[1] != length:
            return value
        return value.expand(rows, *value.shape[1:]).flatten(0, 1)[take]

    return tree_map(select, arguments)


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    """`document_attention` of the documents of the block, in the form of transformers' attention functions.

    query [B, heads, S, D], key and value [B, key heads, S, D] -> [B, S, heads, D].
    """
    documents = _documents.get()
    if documents is None or attention_mask is not None or not getattr(module, "is_causal", True):
        raise ValueError("this attention is for packed documents without a mask")
    rows, length = documents.shape
    if query.shape[0] != rows or query.shape[2] != length or key.shape[2] != length:
        found = f"{query.shape[0]} of {query.shape[2]} queries and {key.shape[2]} keys"
        raise ValueError(f"expected {rows} rows of {length} tokens, got {found}")
    one = (x.transpose(0, 1).reshape(1, x.shape[1], rows * length, -1) for x in (query, key, value))
    out, _ = document_attention(module, *one, documents.bounds, **kwargs)
    return out.reshape(rows, length, *out.shape[2:]).contiguous(), None


def _with_documents(original: Callable) -> Callable:
    """A mask function of transformers that also keeps the documents of the block apart."""

    def mask(*args, mask_function: Callable = causal_mask_function, **kwargs):
        documents = _documents.get()
        if documents is not None:
            ids = documents.ids

            def same(row, head, query, key):
                return ids[row, query] == ids[row, key]

            mask_function = and_masks(mask_function, same)
            kwargs["allow_is_causal_skip"] = False
        return original(*args, mask_function=mask_function, **kwargs)

    return mask


for name in MASKED:
    AttentionMaskInterface.register(name, _with_documents(ALL_MASK_ATTENTION_FUNCTIONS[name]))
AttentionInterface.register(KERNEL, attention)
AttentionMaskInterface.register(KERNEL, lambda *_, **__: None)
