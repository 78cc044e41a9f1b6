"""Attention of documents against one softmax over the whole row under a mask, in float64."""

import inspect
import itertools
import math
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from ds_llm.compat import torch as compat
from ds_llm.models.attention import document_attention

BOUNDS = (0, 5, 6, 18, 24)


def whole(q, k, v, scale, window, softcap, sinks):
    """[1, T, heads, Dv] by explicit scores, keys repeated for all heads."""
    tokens = q.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    owner = torch.bucketize(torch.arange(tokens), torch.tensor(BOUNDS[1:]), right=True)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = (owner[:, None] == owner) & (distance >= 0) & (distance < (window or tokens))
    scores = scores.exp() * seen
    total = scores.sum(-1, keepdim=True) + (sinks.exp().view(1, -1, 1, 1) if sinks is not None else 0)
    return (scores / total @ v).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sink", [False, True])
def test_document_attention(window, softcap, sink):
    q, k, v = (torch.randn(1, heads, 24, width, dtype=torch.float64) for heads, width in ((4, 8), (2, 8), (2, 6)))
    sinks = torch.randn(4, dtype=torch.float64) if sink else None
    leaves = [x.requires_grad_() for x in (q, k, v, sinks) if x is not None]
    expected = whole(q, k, v, 0.4, window, softcap, sinks)
    found, _ = document_attention(
        nn.Module(), q, k, v, BOUNDS, scaling=0.4, sliding_window=window, softcap=softcap, s_aux=sinks
    )
    # the softmax of sinks and soft caps is taken in float32, as transformers takes it
    accuracy = {"rtol": 1e-5, "atol": 1e-5} if softcap or sink else {}
    torch.testing.assert_close(found, expected, **accuracy)
    weights = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), leaves) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, **accuracy)


def by_hand(query, key, value, ends, _, longest, __, scale=None, window=(-1, 0), gqa=False):
    """What torch's variable-length attention computes, [T, heads, D], document by document."""
    assert longest == max(end - start for start, end in itertools.pairwise(ends.tolist()))
    assert gqa or query.shape[1] == key.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return whole(q, k, v, scale or 1 / math.sqrt(q.shape[-1]), window[0] + 1, None, None)[0]


def new(q, k, v, a, b, m, n, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert window_size[1] == 0
    return by_hand(q, k, v, a, b, m, n, scale, window_size, enable_gqa)


def old(q, k, v, a, b, m, n, is_causal=False):
    assert is_causal
    return by_hand(q, k, v, a, b, m, n)


@pytest.mark.parametrize("function", [new, old])
def test_variable_length_attention_is_called_as_each_torch_has_it(function, monkeypatch):
    """Its kernels are for GPUs alone; here only the call is tried, with functions of both signatures."""
    module = ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = function
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    q, k, v = (torch.randn(24, heads, 8) for heads in (4, 2, 2))
    ends = torch.tensor(BOUNDS, dtype=torch.int32)
    expected = whole(*(x.transpose(0, 1)[None] for x in (q, k, v)), 8**-0.5, None, None, None)[0]
    torch.testing.assert_close(compat.variable_length_attention(q, k, v, ends, 12, None, None), expected)
    if function is old:
        for scale, window in ((0.4, None), (None, 4)):
            with pytest.raises(ValueError, match="this torch has no variable-length attention with a"):
                compat.variable_length_attention(q, k, v, ends, 12, scale, window)
        return
    expected = whole(*(x.transpose(0, 1)[None] for x in (q, k, v)), 0.4, 4, None, None)[0]
    torch.testing.assert_close(compat.variable_length_attention(q, k, v, ends, 12, 0.4, 4), expected)


def test_this_torch_has_one_of_these_signatures():
    from torch.nn.attention.varlen import varlen_attn

    assert {"window_size", "is_causal"} & set(inspect.signature(varlen_attn).parameters)
