"""Compact layers against dense ones whose weights and gradients are masked, and compact folders."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ds_llm.errors import UserError
from ds_llm.kernels.sparse_update import PackedMask, expand, expand_into
from ds_llm.models import accelerate
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM
from ds_llm.models.deferred import Deferred, settle
from ds_llm.models.head import attach_loss_head, lm_loss
from ds_llm.pretrained.loading import load_model
from ds_llm.sparsity import compact_checkpoint, linear
from ds_llm.sparsity.linear import SparseLinear
from ds_llm.sparsity.masks import masks_from_zeros
from ds_llm.sparsity.model import add_lora, freeze_dense, sparse_tensors, sparsify, summary
from ds_llm.sparsity.targets import prunable

VOCAB = 67
SIZE = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZE | {"num_key_value_heads": 2, "intermediate_size": 44}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}


def opt():
    sizes = SIZE | {"ffn_dim": 36, "word_embed_proj_dim": 24, "max_position_embeddings": 64, "dropout": 0.0}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes))


MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "llama tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "opt": opt,
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA, head_dim=6)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**LLAMA, **MOE, num_experts=4, head_dim=6)
    ),
    "decoder": lambda: DecoderForCausalLM(
        DecoderConfig(**LLAMA, **MOE, use_moe=True, n_routed_experts=4, max_position_embeddings=64)
    ),
}


@pytest.fixture(autouse=True)
def fresh():
    print("seed", torch.seed())  # shown when a test fails


def pruned(name: str, include=()):
    """A model of random weights, three tenths of each matrix kept, and its masks."""
    model = MODELS[name]().eval()
    for target in prunable(model, include):
        count = target.weight.numel()  # kept: as many each time, so that no other tensor may have that size by chance
        target.weight.mul_((torch.randperm(count) < 0.3 * count).view_as(target.weight))
    return model, masks_from_zeros(model, include=include)


def weights_of(model) -> dict:
    """What the engine gathers."""
    kept = model.state_dict().keys()
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    return state | {n: b.clone() for n, b in model.named_buffers() if n in kept}


def groups(model, decay: float) -> list[dict]:
    matrix = [len(getattr(p, "dense_shape", p.shape)) >= 2 for p in model.parameters()]
    return [
        {"params": [p for p, m in zip(model.parameters(), matrix, strict=True) if m == which], "weight_decay": d}
        for which, d in ((True, decay), (False, 0.0))
    ]


@pytest.mark.parametrize(
    "name, include, kernels",
    [(name, (), True) for name in MODELS]
    + [("llama", ("head", "embeddings"), True), ("qwen3_moe", (), False), ("opt", (), False)],
)
def test_training_is_masked_dense_training(name, include, kernels, tmp_path):
    dense, masks = pruned(name, include)
    sparse = copy.deepcopy(dense)
    for model in (dense, sparse):
        if kernels:
            accelerate(model)
        attach_loss_head(model)
    sparsify(sparse, masks)
    assert [t.name for t in sparse_tensors(sparse)] == sorted(masks, key=[n for n, _ in dense.named_parameters()].index)
    kept = {n: m.to_dense() for n, m in masks.items()}
    start, runs = copy.deepcopy(dict(dense.named_parameters())), {}
    for which, model in (("dense", dense), ("sparse", sparse)):
        optimizer = torch.optim.AdamW(groups(model, 0.1), lr=1e-2)
        generator, runs[which] = torch.Generator().manual_seed(0), []
        for _ in range(5):
            ids = torch.randint(VOCAB, (3, 14), generator=generator)
            found = lm_loss(model, ids[:, :-1], ids[:, 1:])
            loss = found.loss_sum / 39 + found.aux_loss
            optimizer.zero_grad()
            loss.backward()
            for n, p in model.named_parameters():
                if n in kept and which == "dense":
                    p.grad.mul_(kept[n])
            optimizer.step()
            runs[which].append(loss.item())
    assert runs["sparse"] == pytest.approx(runs["dense"], abs=1e-6)
    moved = {n: (p - start[n]).abs().max() for n, p in dense.named_parameters() if n in kept}
    assert min(moved.values()) > 1e-2
    compact_checkpoint.save(sparse, weights_of(sparse), tmp_path)
    back = dict(load_model(tmp_path).named_parameters())
    for n, p in dense.named_parameters():
        torch.testing.assert_close(back[n], p, rtol=1e-4, atol=1e-5)
        if n in kept:
            assert not back[n][~kept[n]].any()


def test_state_has_the_size_of_the_kept_weights():
    model, masks = pruned("llama tied")
    whole = sum(p.numel() for p in model.parameters())
    dense = whole - sum(m.shape.numel() for m in masks.values())
    sparsify(model, masks)
    kept = sum(m.nnz for m in masks.values())
    assert sum(p.numel() for p in model.parameters()) == dense + kept
    found = summary(model, "fp32")
    # on a CPU a mask holds the positions of its values too, 4 bytes each
    bits = sum(m.bits.numel() + 8 * m.offsets.numel() + 4 * m.nnz for m in masks.values())
    assert found["state_bytes"] == 16 * (dense + kept) + bits and found["dense_state_bytes"] == 16 * whole
    freeze_dense(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == kept
    assert summary(model, "bf16")["state_bytes"] == 16 * kept + 2 * dense + bits


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_no_dense_weight_waits_for_the_backward_pass(name):
    model, masks = pruned(name)
    sparsify(attach_loss_head(model), masks)
    sizes = {mask.shape.numel() for mask in masks.values()}
    held = []

    def note(tensor):
        held.append(tensor.numel() if tensor.untyped_storage().nbytes() == tensor.nbytes else 0)
        return tensor

    ids = torch.randint(VOCAB, (1, 3))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        lm_loss(model, ids, ids)
    head = model.get_output_embeddings().weight.numel()
    assert held and not [n for n in held if n in sizes - {head, 3 * 24}]


def test_layer_under_autocast_and_in_half_precision():
    layer = torch.nn.Linear(40, 24)
    mask = PackedMask.from_dense(torch.rand(24, 40) < 0.5)
    layer.weight.data.mul_(mask.to_dense())
    sparse = SparseLinear.from_linear(copy.deepcopy(layer), mask)
    x = torch.randn(2, 5, 40)
    with torch.autocast("cpu", torch.bfloat16):
        one, other = layer(x), sparse(x)
        assert one.dtype == other.dtype == torch.bfloat16
        # a unit in the last place: which kernel the library takes may depend on where the weight lies
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-9)
        upstream = torch.randn_like(one)  # the same for both, whose results may differ
        torch.autograd.backward([one, other], [upstream, upstream])
    expected = layer.weight.grad[mask.to_dense()]
    torch.testing.assert_close(sparse.weight_values.grad, expected, rtol=2**-7, atol=2**-7)
    x = x.bfloat16()
    torch.testing.assert_close(sparse.bfloat16()(x), layer.bfloat16()(x), rtol=2**-7, atol=2**-9)
    assert torch.equal(sparse.weight, layer.weight)


def test_no_result_lies_in_the_memory_that_products_share():
    def spoil():
        for memory in vars(linear._memory).values():
            memory.fill_(torch.nan)

    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns in ((24, 40), (1, 1), (40, 7)):
            mask = PackedMask.from_dense(torch.rand(rows, columns) < 0.5)
            layer = SparseLinear(torch.randn(mask.nnz, dtype=dtype), mask, torch.nn.Parameter(torch.randn(rows)))
            layer = layer.to(dtype)
            dense, x = layer.weight.detach().clone(), torch.randn(3, columns, dtype=dtype, requires_grad=True)
            y = layer(x)
            spoil()
            grads = torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))
            spoil()
            torch.testing.assert_close(y, torch.nn.functional.linear(x, dense, layer.bias))
            sums = x.detach().sum(0).expand(rows, columns)
            for found, expected in zip(grads, (dense.sum(0).expand(3, -1), sums[mask.to_dense()]), strict=False):
                torch.testing.assert_close(found, expected, rtol=2e-2, atol=5e-2)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_expanding_into_used_memory():
    for dtype in (torch.float32, torch.bfloat16):
        mask = PackedMask.from_dense(torch.rand(5, 3, 21) < 0.4)
        values = torch.randn(mask.nnz, dtype=dtype)
        memory = torch.full(mask.shape, torch.nan, dtype=dtype)
        assert torch.equal(expand_into(memory, values, mask), expand(values, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compact_folder_comes_back_bitwise_and_is_small(dtype, tmp_path):
    model, masks = pruned("llama tied")
    model.to(dtype).save_pretrained(tmp_path / "dense")
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    sparsify(model, masks)
    compact_checkpoint.save(model, weights_of(model), tmp_path / "compact")
    back = load_model(tmp_path / "compact")
    assert back.dtype == dtype and back.lm_head.weight is back.model.embed_tokens.weight
    assert all(torch.equal(p, expected[n]) for n, p in back.named_parameters())
    assert back.generation_config.to_dict() == model.generation_config.to_dict()
    again = sparsify(load_model(tmp_path / "compact"), compact_checkpoint.load_masks(tmp_path / "compact"))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    lazy = load_model(tmp_path / "compact", "fp32", deferred=True)
    sparsify(lazy, compact_checkpoint.load_masks(tmp_path / "compact"))
    assert all(isinstance(tensor.values, Deferred) for tensor in sparse_tensors(lazy))  # no kept value is read yet
    settle(lazy)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(lazy.parameters(), again.parameters(), strict=True))
    table = json.loads((tmp_path / "compact" / "sparsity.json").read_text())
    assert {row["name"]: row["kept"] for row in table} == {n: m.nnz for n, m in masks.items()}
    assert all(row["nonzero"] == int(expected[row["name"]].count_nonzero()) for row in table)
    tensors = load_file(tmp_path / "compact" / "sparse.safetensors")
    size = sum(t.nbytes for n, t in tensors.items() if n.endswith((".values", ".bits")))
    assert size == sum(m.nnz * dtype.itemsize + m.bits.numel() for m in masks.values())


def test_masked_adapters_merge_to_the_bit_and_keep_the_zeros(tmp_path):
    model, masks = pruned("llama")
    start = {n: m.to_dense() for n, m in masks.items()}
    attach_loss_head(model)
    sparsify(model, masks)
    before = sum(p.numel() for p in model.parameters())
    assert add_lora(model, ["q_proj", "mlp.down_proj"], 3, 2.0, "gaussian") == 4
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in model.parameters()) - before
    ids = torch.randint(VOCAB, (3, 14))
    plain = model(input_ids=ids).logits
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    for _ in range(4):
        optimizer.zero_grad()
        lm_loss(model, ids[:, :-1], ids[:, 1:]).loss_sum.backward()
        optimizer.step()
    with torch.no_grad():
        adapted = model.eval()(input_ids=ids).logits
        assert (adapted - plain).abs().max() > 1e-2
        layer = model.model.layers[0].self_attn.q_proj
        mask = start["model.layers.0.self_attn.q_proj.weight"]
        base = expand(layer.weight_values, layer.weight_mask)
        torch.testing.assert_close(layer.weight, base + 2.0 * mask * (layer.lora_B @ layer.lora_A))
        compact_checkpoint.save(model, weights_of(model), tmp_path)
        back = load_model(tmp_path)
        assert torch.equal(back(input_ids=ids).logits, adapted)
    assert not any(p[~start[n]].any() for n, p in back.named_parameters() if n in start)
    with pytest.raises(UserError, match="'lm_head' is no pruned linear layer"):
        add_lora(model, ["lm_head"], 3, 2.0, "default")


def test_a_changed_density_is_not_saved(tmp_path):
    model, masks = pruned("llama")
    sparsify(model, masks)
    weights = weights_of(model)
    name = "model.layers.1.mlp.up_proj.weight"
    damaged = dict(weights)
    damaged[f"{name}_mask.bits"] = weights[f"{name}_mask.bits"].clone()
    damaged[f"{name}_mask.bits"][0, 0] ^= 1
    short = {**weights, f"{name}_values": weights[f"{name}_values"][:-1]}
    for wrong in (damaged, short):
        with pytest.raises(UserError, match=f"not saved: {name} started with"):
            compact_checkpoint.save(model, wrong, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_masks_that_do_not_fit_are_refused():
    model, masks = pruned("llama tied")
    name = "model.layers.0.mlp.up_proj.weight"
    empty = torch.zeros(model.get_parameter(name).shape, dtype=torch.bool)
    tied = PackedMask.from_dense(torch.ones(VOCAB, 24, dtype=torch.bool))
    for wrong, text in (
        ({"model.layers.7.mlp.up_proj.weight": masks[name]}, "the model has no weight model.layers.7"),
        ({name: masks["model.layers.0.mlp.down_proj.weight"]}, r"\[44, 24\] in the model and \[24, 44\] in the mask"),
        ({name: PackedMask.from_dense(empty)}, "that the mask drops are not 0"),
        ({"model.embed_tokens.weight": tied}, "tied embeddings must stay dense"),
    ):
        with pytest.raises(UserError, match=text):
            sparsify(copy.deepcopy(model), wrong)


def test_a_damaged_compact_folder_is_one_line(tmp_path):
    model, masks = pruned("llama")
    sparsify(model, masks)
    compact_checkpoint.save(model, weights_of(model), tmp_path)
    path = tmp_path / "sparse.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_model(tmp_path)
    save_file(load_file_bytes(whole, tmp_path), path)
    with pytest.raises(UserError, match="not a sparse model of version 1"):
        load_model(tmp_path)


def load_file_bytes(content: bytes, folder) -> dict:
    (folder / "copy").write_bytes(content)
    return load_file(folder / "copy")
