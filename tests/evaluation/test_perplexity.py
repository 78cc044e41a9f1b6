"""The perplexity protocol against brute force, and the same bits whatever the number of processes."""

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_llm.errors import UserError
from ds_llm.evaluation.perplexity import model_loss, perplexity_of_tokens
from ds_llm.models.head import attach_loss_head

COMMON = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ROPE = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**ROPE),
    "gemma2-softcap": lambda: transformers.Gemma2Config(**ROPE, head_dim=8, final_logit_softcapping=3.0),
    "opt-projected": lambda: transformers.OPTConfig(
        **COMMON, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=1
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**COMMON, intermediate_size=48, max_position_embeddings=64),
    "olmoe": lambda: transformers.OlmoeConfig(**ROPE, num_experts=4, num_experts_per_tok=2),
    "granite-scaled": lambda: transformers.GraniteConfig(**ROPE, logits_scaling=4.0),
}


def tiny(name: str, seed: int = 0):
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def bigram(seed: int, vocab: int = 11):
    """Log-probabilities [vocab, vocab] of a chain, and the loss function that scores rows with it."""
    logp = np.random.default_rng(seed).normal(size=(vocab, vocab))
    logp -= np.log(np.exp(logp).sum(1, keepdims=True))
    table = torch.from_numpy(logp)

    def loss(input_ids, labels):
        picked = -table[input_ids, labels.clamp(min=0)]
        return torch.where(labels == -100, 0.0, picked).sum(1)

    return logp, loss


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    token_length=st.integers(2, 20),
    part=st.floats(0, 1),
    batch_size=st.integers(1, 5),
    max_windows=st.integers(0, 4),
    seed=st.integers(0, 10**6),
)
def test_equals_a_loop_over_windows(lengths, token_length, part, batch_size, max_windows, seed):
    """The scored tokens are found by walking the stream, not by window arithmetic."""
    stride = max(1, round(part * token_length))
    logp, loss = bigram(seed)
    rng = np.random.default_rng(seed + 1)
    streams = [rng.integers(0, 11, n).astype(np.uint16) for n in lengths]
    total, count, windows, dropped = 0.0, 0, 0, 0
    for stream in streams:
        seen, end = 0, 0  # tokens of this stream that some window has covered
        for first in range(0, len(stream), stride):
            window = stream[first : first + token_length]
            if len(window) < token_length or (max_windows and windows == max_windows):
                break
            for j in range(1, token_length):
                if first + j >= seen:
                    total, count = total - logp[window[j - 1], window[j]], count + 1
            seen = end = first + token_length
            windows += 1
        dropped += len(stream) - end
    arguments = {"token_length": token_length, "stride": stride, "batch_size": batch_size, "max_windows": max_windows}
    if not windows:
        with pytest.raises(UserError, match="less than one window"):
            perplexity_of_tokens(loss, streams, **arguments)
        return
    found = perplexity_of_tokens(loss, streams, **arguments)
    assert (found.windows, found.tokens, found.dropped_tokens) == (windows, count, dropped)
    assert found.stream_tokens == sum(lengths)
    assert math.isclose(found.nll, total / count, rel_tol=1e-12)
    assert math.isclose(found.value, math.exp(total / count), rel_tol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_model_equals_its_own_logits(name):
    """exp of the mean over windows of transformers' own loss of a window."""
    model = tiny(name)
    tokens = torch.randint(2, 97, (5 * 16 + 7,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rows = tokens[: 5 * 16].view(5, 16)
        losses = []
        for row in rows:
            logits = model(row[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, row[1:]).item())
    found = perplexity_of_tokens(model_loss(attach_loss_head(model), "cpu"), tokens, token_length=16, batch_size=2)
    assert found.windows == 5 and found.dropped_tokens == 7
    assert math.isclose(found.value, math.exp(sum(losses) / 5), rel_tol=1e-5)


def test_no_logits_of_a_whole_batch_are_kept():
    """The largest tensor made has fewer numbers than the logits of the batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    Largest.numel = max(Largest.numel, tensor.numel())
            return out

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**ROPE, "vocab_size": 4096, "max_position_embeddings": 256})
    model = attach_loss_head(transformers.LlamaForCausalLM(config).eval())
    tokens = torch.randint(0, 4096, (8 * 256,))
    with Largest():
        perplexity_of_tokens(model_loss(model, "cpu"), tokens, token_length=256, batch_size=8)
    assert 0 < Largest.numel < 8 * 256 * 4096 // 4


def test_impossible_windows_are_refused():
    _, loss = bigram(0)
    tokens = np.zeros(100, np.uint16)
    for arguments, message in (
        ({"token_length": 1}, "2 tokens or more"),
        ({"token_length": 8, "stride": 9}, "between 1 and"),
        ({"token_length": 8, "stride": 0}, "between 1 and"),
        ({"token_length": 8, "batch_size": 0}, "at least 1"),
        ({"token_length": 101}, "100 tokens, less than one window"),
    ):
        with pytest.raises(UserError, match=message):
            perplexity_of_tokens(loss, tokens, **arguments)


def test_a_model_that_fails_is_not_a_number():
    found = perplexity_of_tokens(lambda x, y: torch.full((len(x),), math.nan), np.zeros(9, int), token_length=4)
    assert math.isnan(found.value) and math.isnan(found.nll)
    huge = perplexity_of_tokens(lambda x, y: torch.full((len(x),), 1e9), np.zeros(9, int), token_length=4)
    assert huge.value == math.inf
