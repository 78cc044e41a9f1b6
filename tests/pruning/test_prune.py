"""Pruning against a straightforward float64 reference that keeps every activation and knows no blocks."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from jobs import VOCAB
from pruning_models import MODELS, llama, opt, qwen3_moe, uneven

from ds_llm.errors import UserError
from ds_llm.pruning.blockwise import prune_model
from ds_llm.pruning.calibrate import Blocks
from ds_llm.pruning.scores import Pattern, curvature, keep_largest, magnitude_scores, select, sparsegpt, wanda_scores
from ds_llm.sparsity.targets import find_blocks


@pytest.fixture(autouse=True)
def fresh():
    print("seed", torch.seed())  # shown when a test fails


def layer_inputs(model, tokens, block, prefix):
    """Inputs [T, C] of every linear layer of a block, of each expert apart, from whole forward passes."""
    found, handles = {}, []

    def keep(name):
        return lambda module, args: found.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

    def route(name):
        def hook(module, args):
            x = args[0].reshape(-1, args[0].shape[-1])
            chosen = (x @ module.gate.weight.t()).softmax(-1).topk(2, dim=-1).indices
            for e in range(4):
                rows = x[(chosen == e).any(-1)]
                gate, up = F.linear(rows, module.experts.gate_up_proj[e]).chunk(2, dim=-1)
                found.setdefault((f"{name}.experts.gate_up_proj", e), []).append(rows)
                found.setdefault((f"{name}.experts.down_proj", e), []).append(F.silu(gate) * up)

        return hook

    for path, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(keep((f"{prefix}.{path}.weight", 0))))
        elif hasattr(module, "experts"):
            handles.append(module.register_forward_pre_hook(route(f"{prefix}.{path}")))
    for row in tokens:
        model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    return {key: torch.cat(parts) for key, parts in found.items()}


def groups_of(scores, pattern):
    """Scores as [groups, weights that are compared]."""
    if pattern.m:
        return scores.reshape(-1, pattern.m)
    return scores if pattern.scope == "row" else scores.reshape(1, -1)


def check_choice(scores, mask, pattern, kept):
    """Exactly `kept` of each group stay, and no pruned score is above a kept one by more than float32 rounding."""
    scores, mask = groups_of(scores, pattern), groups_of(mask, pattern)
    assert (mask.sum(1) == kept).all()
    assert (scores.masked_fill(mask, 0).amax(1) <= scores.masked_fill(~mask, math.inf).amin(1) * (1 + 1e-3)).all()


def kept_of(pattern, rows, columns):
    if pattern.m:
        return pattern.n
    return round(pattern.density * (columns if pattern.scope == "row" else rows * columns))


def optimal_brain_surgeon(weight, x, mask, pattern, damping=0.01, width=128):
    """Column by column, each time from the inverse of the Hessian of the columns that are left; checks the choices."""
    weight, hessian = weight.clone(), x.t() @ x
    dead = hessian.diagonal() == 0
    mean = hessian.diagonal()[~dead].mean()
    hessian += torch.diag(damping * mean + dead * mean)
    rows, columns = weight.shape
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    scale = torch.stack([inverse[0, 0] for inverse in inverses])
    for j in range(columns):
        span = pattern.m or width
        if j % span == 0:
            part = slice(j, min(j + span, columns))
            scores = (weight[:, part].square() / scale[part]).masked_fill(dead[part], 0)
            if pattern.m:
                check_choice(scores, mask[:, part], pattern, pattern.n)
            else:
                unit = 1 if pattern.scope == "row" else rows
                quota = round(pattern.density * unit * part.stop) - round(pattern.density * unit * j)
                check_choice(scores, mask[:, part], pattern, quota)
        error = weight[:, j].masked_fill(mask[:, j], 0) / scale[j]
        weight[:, j:] -= error[:, None] * inverses[j][0]
        weight[:, j].masked_fill_(~mask[:, j], 0)
    return weight


CASES = [
    ("opt", "magnitude", Pattern(0.3)),
    ("opt", "sparsegpt", Pattern(0.3)),
    ("opt_post_norm", "wanda", Pattern(0.2, "row")),
    ("opt_post_norm", "sparsegpt", Pattern(0.5, "row", 2, 4)),
    ("llama", "wanda", Pattern(0.5, "row", 4, 8)),
    ("llama", "sparsegpt", Pattern(0.1, "row")),
    ("llama", "sparsegpt", Pattern(0.05)),
    ("opt", "wanda", Pattern(0.9)),
    ("qwen2", "wanda", Pattern(0.7)),
    ("qwen2", "sparsegpt", Pattern(0.5, "row", 4, 8)),
    ("qwen3", "magnitude", Pattern(0.5, "row", 2, 4)),
    ("experts", "wanda", Pattern(0.4, "row")),
    ("experts", "sparsegpt", Pattern(0.6)),
    ("qwen3_moe", "sparsegpt", Pattern(0.5, "row", 2, 4)),
    ("qwen3_moe", "magnitude", Pattern(0.05, "row")),
]


@pytest.mark.parametrize(("name", "method", "pattern"), CASES)
@torch.no_grad()
def test_every_choice_and_weight_is_that_of_a_plain_reference(name, method, pattern):
    model = uneven(MODELS[name]())
    reference, before = copy.deepcopy(model).double(), copy.deepcopy(model.state_dict())
    reference.config._experts_implementation = "eager"  # transformers' grouped product has no float64
    tokens = torch.randint(VOCAB, (6, 48))
    done = prune_model(model, method, pattern, None if method == "magnitude" else tokens)
    pruned = dict(model.named_parameters())
    doubles = dict(reference.named_parameters())
    for prefix, block in find_blocks(reference):
        inputs = layer_inputs(reference, tokens, block, prefix)
        assert inputs.keys() >= {(key, 0) for key in done if key.startswith(prefix)}
        for (key, expert), x in inputs.items():
            if key not in done:
                assert key.endswith("gate.weight")
                continue
            pick = (lambda t, e=expert: t[e]) if doubles[key].dim() == 3 else (lambda t: t)
            dense, ours, mask = (pick(t) for t in (doubles[key], pruned[key].double(), done[key].mask.to_dense()))
            if method != "magnitude":
                assert done[key].tokens[expert] == len(x)
            if method == "sparsegpt":
                expected = optimal_brain_surgeon(dense, x, mask, pattern)
                torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-4)
            else:
                scores = dense.abs() * (x.square().sum(0).sqrt() if method == "wanda" else 1)
                check_choice(scores, mask, pattern, kept_of(pattern, *dense.shape))
                assert torch.equal(ours, dense * mask)
            assert (ours[~mask] == 0).all()
            assert int(mask.sum()) == kept_of(pattern, *dense.shape) * len(groups_of(mask, pattern))
        for key, parameter in block.named_parameters(prefix=prefix):
            parameter.copy_(pruned[key])
    for key, value in before.items():  # biases, norms, embeddings, head, routers
        assert key in done or torch.equal(value, model.state_dict()[key])
    assert not any("embed" in key or "lm_head" in key or key.endswith("gate.weight") for key in done)


@torch.no_grad()
def test_sparsegpt_crosses_blocks_of_columns_and_passes_over_dead_inputs():
    x = torch.randn(800, 200, dtype=torch.float64) @ torch.randn(200, 200, dtype=torch.float64) * 0.1
    x[:, [3, 150, 199]] = 0
    weight = torch.randn(12, 200, dtype=torch.float64)
    for pattern in (Pattern(0.37), Pattern(0.2, "row"), Pattern(0.5, "row", 5, 10)):
        found, mask = sparsegpt(weight.float(), curvature((x.t() @ x).float(), 0.01, "w"), pattern)
        expected = optimal_brain_surgeon(weight, x, mask, pattern, width=128 if not pattern.m else 120)
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-3)
        assert int(mask.sum()) == kept_of(pattern, 12, 200) * len(groups_of(mask, pattern))
        assert pattern.m or not mask[:, [3, 150, 199]].any()


@torch.no_grad()
def test_each_method_loses_less_of_a_layers_output_than_the_one_before():
    x = torch.randn(2000, 96) @ torch.randn(96, 96) * torch.rand(96).square()
    weight = torch.randn(64, 96)
    for pattern in (Pattern(0.5, "row"), Pattern(0.5, "row", 2, 4)):
        kept = [
            weight * select(magnitude_scores(weight), pattern),
            weight * select(wanda_scores(weight, x.square().sum(0)), pattern),
            sparsegpt(weight, curvature(x.t() @ x, 0.01, "w"), pattern)[0],
        ]
        losses = [float((x @ (weight - one).t()).square().sum()) for one in kept]
        assert losses[2] < losses[1] < losses[0]


def test_of_equal_scores_the_first_are_pruned():
    scores = torch.randint(3, (5, 40)).float()
    for kept in (1, 13, 39, 40):
        order = scores.sort(dim=1, stable=True).indices[:, : 40 - kept]
        assert torch.equal(keep_largest(scores, kept), torch.ones(5, 40).scatter(1, order, 0).bool())


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_one_block_at_a_time_is_in_float32(method):
    model = llama(num_hidden_layers=3).to(torch.bfloat16).eval()
    blocks = [block for _, block in find_blocks(model)]
    wide, most = [], []

    def look(*_):
        wide.append([i for i, b in enumerate(blocks) if any(p.dtype == torch.float32 for p in b.parameters())])
        most.append(sum(t.numel() for t in model.parameters() if t.dtype == torch.float32))

    for block in blocks:
        block.register_forward_pre_hook(look)
    tokens = torch.randint(VOCAB, (4, 16))
    prune_model(model, method, Pattern(0.5), None if method == "magnitude" else tokens, include=["head"])
    assert all(len(one) <= 1 for one in wide)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    if method == "sparsegpt":
        # recorded twice, stopped before the first block, each block before and after it is pruned, on to the head
        assert len(wide) == 2 * 3 + 4 + 2 * 4 * 3 + 4 * 3
        outside = sum(p.numel() for p in model.parameters()) - sum(p.numel() for b in blocks for p in b.parameters())
        assert max(most) == outside + sum(p.numel() for p in blocks[0].parameters())


@torch.no_grad()
def test_head_and_embeddings_are_pruned_on_request():
    tokens = torch.randint(VOCAB, (5, 32))
    model = uneven(opt(word_embed_proj_dim=16, tie_word_embeddings=False))
    dense = copy.deepcopy(model).double()
    done = prune_model(model, "wanda", Pattern(0.5, "row"), tokens, include=["head", "embeddings"])
    table, head = "model.decoder.embed_tokens.weight", "lm_head.weight"
    check_choice(dense.get_parameter(table).abs(), done[table].mask.to_dense(), Pattern(0.5, "row"), 8)
    hidden = torch.cat([model.double().model(input_ids=row[None]).last_hidden_state[0] for row in tokens])
    scores = dense.get_parameter(head).abs() * hidden.square().sum(0).sqrt()
    check_choice(scores, done[head].mask.to_dense(), Pattern(0.5, "row"), 8)
    assert done[head].tokens == [5 * 32] and done[table].tokens == []
    tied = uneven(llama(tie_word_embeddings=True))
    done = prune_model(tied, "wanda", Pattern(0.5, "row"), tokens, include=["head", "embeddings"])
    assert done["model.embed_tokens.weight"].tokens == [5 * 32]
    assert (tied.lm_head.weight == 0).float().mean() == 0.5 and tied.lm_head.weight is tied.model.embed_tokens.weight


def test_an_expert_without_tokens_is_pruned_by_magnitude(monkeypatch):
    model = uneven(qwen3_moe())
    gate = model.model.layers[1].mlp.gate.weight
    inputs = []
    model.model.layers[1].mlp.gate.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    tokens = torch.randint(VOCAB, (3, 32))
    with torch.no_grad():
        gate.zero_()  # equal logits: some experts are never chosen
        before = copy.deepcopy(model)
        done = prune_model(model, "sparsegpt", Pattern(0.5, "row"), tokens)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    idle = [e for e, count in enumerate(done[name].tokens) if not count]
    assert idle and done[name].unseen == len(idle)
    mask, weight = done[name].mask.to_dense()[idle], before.get_parameter(name)[idle]
    check_choice(weight.abs().flatten(0, 1).double(), mask.flatten(0, 1), Pattern(0.5, "row"), 16)
    assert torch.equal(model.get_parameter(name)[idle], weight * mask)


def test_models_that_cannot_be_pruned_are_refused():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(UserError, match=r"transformer\.h\.0\.attn\.c_attn: a Conv1D"):
        prune_model(gpt2, "magnitude", Pattern(0.5))
    tokens = torch.randint(VOCAB, (3, 8))
    with pytest.raises(UserError, match="40 inputs are not a multiple of 16"):
        prune_model(llama(), "magnitude", Pattern(0.5, "row", 8, 16))
    model = llama()
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.weight: .*not finite"):
        prune_model(model, "wanda", Pattern(0.5), tokens)
    with pytest.raises(UserError, match="singular"):
        prune_model(llama(), "sparsegpt", Pattern(0.5), tokens[:1], damping=1e-12)
    model = llama()
    model.model.layers[1].register_forward_pre_hook(lambda m, a, k: (a, k | {"extra": torch.rand(1)}), with_kwargs=True)
    with pytest.raises(UserError, match="block 1 is given something"):
        Blocks(model, [block for _, block in find_blocks(model)], tokens, torch.device("cpu"))
    model = llama()
    model.model.layers[1].register_forward_pre_hook(lambda m, a: (a[0] + 1, *a[1:]))
    with pytest.raises(UserError, match="do not simply follow"):
        Blocks(model, [block for _, block in find_blocks(model)], tokens, torch.device("cpu"))
