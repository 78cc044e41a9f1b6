"""Deferred tensors: any part of what functions of them give, read alone, is that part of what torch computes."""

import pytest
import torch
from torch import nn

from ds_llm.models.deferred import Deferred, in_place_of, of_file, read, replace, settle, settle_mapped, whole


def pair(*shape: int, dtype=torch.float32) -> tuple[Deferred, torch.Tensor]:
    values = torch.randn(shape).to(dtype)
    return of_file(values), values


def experts(count: int = 6, dtype=torch.bfloat16) -> tuple[Deferred, torch.Tensor]:
    """Gate and up projections of experts, joined as transformers joins them."""
    gates, ups = ([pair(5, 8, dtype=dtype) for _ in range(count)] for _ in range(2))
    return tuple(
        torch.cat([torch.stack([g[i] for g in gates]), torch.stack([u[i] for u in ups])], dim=1) for i in range(2)
    )


FUNCTIONS = {
    "stack": lambda a, b: torch.stack([a, b]),
    "stack inside": lambda a, b: torch.stack([a, b], dim=1),
    "join": lambda a, b: torch.cat([a, b]),
    "join inside": lambda a, b: torch.cat([a, b], dim=-1),
    "join of dtypes": lambda a, b: torch.cat([a, b.half()]),
    "cast": lambda a, b: a.to(torch.bfloat16),
    "transpose": lambda a, b: a.t(),
    "contiguous": lambda a, b: a.t().contiguous(),
    "slice": lambda a, b: a[1:5],
    "slice with a step": lambda a, b: a[::2],
    "slice inside": lambda a, b: a[:, 2:7],
    "slice of a transpose": lambda a, b: a.t()[1:3],
    "slice of a join": lambda a, b: torch.cat([a, b], dim=1)[2:4],
    "row": lambda a, b: a[3],
    "chunks": lambda a, b: a.chunk(3, dim=1)[2],
    "split": lambda a, b: a.split([2, 4])[1],
    "views": lambda a, b: a.view(2, 3, 8).permute(1, 0, 2).reshape(6, 8),
    "sum": lambda a, b: a * 2 + b,
    "copy": lambda a, b: torch.stack([a, b])[1].clone(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_part_is_as_torch_computes_it(name):
    (a, x), (b, y) = pair(6, 8), pair(6, 8)
    lazy, expected = FUNCTIONS[name](a, b), FUNCTIONS[name](x, y)
    assert isinstance(lazy, Deferred) and (lazy.shape, lazy.dtype) == (expected.shape, expected.dtype)
    flat = expected.reshape(-1)
    for _ in range(30):
        start, end = sorted(torch.randint(flat.numel() + 1, (2,)).tolist())
        for dtype in (expected.dtype, torch.float64):
            out = torch.empty(end - start, dtype=dtype)
            read(lazy, start, end, out)
            assert torch.equal(out, flat[start:end].to(dtype))
    assert torch.equal(whole(lazy), expected)


def test_joined_experts_are_read_in_parts_and_cast_twice():
    lazy, expected = experts()
    share = lazy.to(torch.float32)[2:4]  # what expert parallelism takes
    assert share.runs is not None
    up = share.chunk(2, dim=1)[1]
    assert torch.equal(whole(nn.Parameter(up.clone())), expected.float()[2:4].chunk(2, dim=1)[1])
    fine, rough = torch.tensor([1 + 2**-9 + 2**-20]), torch.empty(1, dtype=torch.float16)
    read(of_file(fine).to(torch.bfloat16), 0, 1, rough)  # 1.00195 would be the half nearest to the value itself
    assert rough.item() == fine.bfloat16().half().item() != fine.half().item()


def test_what_needs_values_gets_them_and_what_changes_them_is_refused():
    a, x = pair(4, 4)
    assert a.sum().item() == x.sum().item() and bool((a == a).all())
    assert not torch.zeros_like(a).any() and not isinstance(torch.zeros_like(a), Deferred)
    with pytest.raises(RuntimeError, match="call `settle` before it"):
        a.add_(1)
    with pytest.raises(RuntimeError, match="call `settle` before it"), torch.no_grad():
        nn.Parameter(a)[0] = 0


def module() -> tuple[nn.Module, torch.Tensor]:
    lazy, expected = experts()
    found = nn.Module()
    found.first, found.tied = (parameter := nn.Parameter(lazy, requires_grad=False)), parameter
    parameter.mark = "kept"
    found.plain, found.mapped = nn.Parameter(torch.ones(2)), nn.Parameter(pair(3)[0])
    found.register_buffer("bias", pair(3)[0].to(torch.bfloat16))
    return found, expected


def test_settled_modules_keep_ties_marks_and_frozen_weights():
    found, expected = module()
    settle_mapped(found)
    assert isinstance(found.first, Deferred) and not isinstance(found.mapped, Deferred)
    assert not isinstance(found.bias, Deferred)
    assert settle(found, only=[found.plain]) is found and isinstance(found.first, Deferred)
    plain = found.plain
    settle(found, dtype=torch.float32)
    assert found.first is found.tied and found.first.mark == "kept" and not found.first.requires_grad
    assert found.plain is plain and type(found.first) is nn.Parameter
    assert torch.equal(found.first, expected.float())


def test_replaced_weights_are_asked_for_once():
    found, _ = module()
    asked = []
    replace(found, lambda old: (asked.append(old), in_place_of(old, torch.zeros(old.shape)))[1])
    assert len(asked) == 4 and found.first is found.tied and not found.bias.any()
