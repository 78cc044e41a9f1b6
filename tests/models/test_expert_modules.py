"""Fused experts of all families: which are found, and that grouped products give what the library computes."""

from functools import cache

import pytest
import torch
from architectures import ARCHITECTURES, FUSED_EXPERTS, NOT_SHARED, OTHER_EXPERTS, tiny
from torch import nn

from ds_llm.models import accelerate
from ds_llm.models.expert_modules import is_fused, is_shareable, run_experts


@cache
def experts(name: str) -> nn.Module | None:
    """The first module of fused experts in a tiny model, with random weights, and biases that matter."""
    torch.manual_seed(0)
    module = next((m for m in tiny(name).modules() if is_fused(m)), None)
    for p in module.parameters() if module is not None else ():
        nn.init.normal_(p, std=0.2)
    return module


def test_the_families_are_all_that_have_them():
    found = {name for name in ARCHITECTURES if any(p.dim() == 3 for p in expert_weights(name))}
    assert found == {*FUSED_EXPERTS, *OTHER_EXPERTS}
    assert all(experts(name) is None for name in OTHER_EXPERTS)
    assert {name for name in FUSED_EXPERTS if not is_shareable(experts(name))} == set(NOT_SHARED)


@cache
def expert_weights(name: str) -> list[nn.Parameter]:
    owners = [m for m in tiny(name).modules() if hasattr(m, "num_experts")]
    return [p for owner in owners for p in owner.parameters(recurse=False)]


@pytest.mark.parametrize("name", FUSED_EXPERTS)
def test_grouped_products_are_what_the_library_computes(name):
    """Outputs and all gradients, with an expert that no token chose and one that all chose."""
    module = experts(name)
    count, width = module.num_experts, module.down_proj.shape[-1 if module.is_transposed else 1]
    tokens, top_k = 37, min(3, count - 1)
    index = torch.stack([torch.randperm(count - 1)[:top_k] for _ in range(tokens)])  # nobody chooses the last expert
    index[:, 0] = torch.where((index == 0).any(1), index[:, 0], 0)
    results = []
    for forward in (type(module).forward, run_experts):
        torch.manual_seed(1)
        hidden = torch.randn(tokens, width, requires_grad=True)
        weights = torch.rand(tokens, top_k, requires_grad=True)
        module.zero_grad()
        out = forward(module, hidden, index, weights)
        (out * torch.randn_like(out)).sum().backward()
        results.append([out, hidden.grad, weights.grad, *(p.grad.clone() for p in module.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, atol=2e-5 * max(1, one.abs().max().item()), rtol=1e-4)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "nemotron_h"])
def test_a_whole_model_keeps_its_logits(name):
    model = tiny(name).eval()
    ids = torch.randint(2, 64, (2, 17))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        assert accelerate(model).experts > 0
        found = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)
