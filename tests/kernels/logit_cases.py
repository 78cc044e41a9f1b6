"""Random hidden states, output heads and labels, and their logits in float64."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# the path is the same for all examples of a test
options = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
small = st.fixed_dictionaries(
    {
        "tokens": st.sampled_from([0, 1, 2, 5, 9]),
        "hidden": st.integers(1, 17),
        "vocabulary": st.sampled_from([1, 2, 63, 64, 65, 130, 300]),
        "dtype": st.sampled_from(DTYPES),
        "bias": st.booleans(),
        "softcap": st.sampled_from([None, 5.0]),
        "seed": st.integers(0, 2**31),
    }
)


def inputs(case: dict, device: torch.device) -> tuple:
    """Products of small integers: exact in every dtype, so that only the statistics round. Many logits tie."""
    T, H, V, dtype = case["tokens"], case["hidden"], case["vocabulary"], case["dtype"]
    g = torch.Generator().manual_seed(case["seed"])
    # neither is contiguous, nor are the labels
    hidden = torch.randint(-3, 4, (H, T), generator=g).to(dtype).t()
    weight = (torch.randint(-3, 4, (V, 2 * H), generator=g) / 8).to(dtype)[:, ::2]
    labels = torch.randint(V, (T, 2), generator=g)[:, 0]
    bias = (torch.randint(-8, 9, (V,), generator=g) / 4).to(dtype) if case["bias"] else None
    return tuple(None if t is None else t.to(device) for t in (hidden, weight, labels, bias))


def exact_logits(hidden, weight, bias, softcap, temperature=1.0):
    x = hidden.double() @ weight.double().t()
    if bias is not None:
        x = x + bias.double()
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x / temperature
