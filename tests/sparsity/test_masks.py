"""The mask file, and masks read from zeros."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ds_llm.errors import UserError
from ds_llm.kernels.packed_mask import PackedMask
from ds_llm.sparsity.masks import FILE, load_masks, masks_from_zeros, read_meta, save_masks


@pytest.fixture(autouse=True)
def fresh():
    print("seed", torch.seed())  # shown when a test fails


@settings(max_examples=10)
@given(st.lists(st.integers(1, 19), min_size=2, max_size=3), st.floats(0, 1))
def test_masks_come_back_as_they_were(tmp_path_factory, shape, density):
    folder = tmp_path_factory.mktemp("masks")
    one, other = torch.rand(shape) < density, torch.rand(shape) < density
    save_masks(folder, {"b": PackedMask.from_dense(other), "a.weight": one}, {"method": "wanda", "density": "0.5"})
    found = load_masks(folder)
    assert list(found) == ["a.weight", "b"]
    assert torch.equal(found["a.weight"].to_dense(), one) and torch.equal(found["b"].to_dense(), other)
    assert found["b"].nnz == int(other.sum())
    assert torch.equal(found["b"].offsets, PackedMask.from_dense(other).offsets)
    rows = one.numel() // shape[-1]
    for i, (row, bits) in enumerate(zip(one.view(rows, -1), load_file(folder / FILE)["a.weight"], strict=True)):
        assert [bool(bits[j // 8] >> (j % 8) & 1) for j in range(shape[-1])] == row.tolist(), i
    assert read_meta(folder)["method"] == "wanda" and read_meta(folder / FILE)["density"] == "0.5"
    bytes_before = (folder / FILE).read_bytes()
    save_masks(folder, {"a.weight": one, "b": other}, {"density": "0.5", "method": "wanda"})
    assert (folder / FILE).read_bytes() == bytes_before


def test_files_that_are_no_masks_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"masks\.safetensors: no such mask file"):
        load_masks(tmp_path)
    assert read_meta(tmp_path) == {}
    file = tmp_path / FILE
    save_file({"a": torch.zeros(2, 2)}, file)
    with pytest.raises(UserError, match="not a mask file"):
        load_masks(tmp_path)
    save_masks(tmp_path, {"a": torch.rand(5, 9) < 0.5}, {})
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_masks(file)
    about, bits = read_meta_of(whole, tmp_path), torch.full((5, 2), 255, dtype=torch.uint8)
    save_file({"a": bits}, file, metadata=about)
    with pytest.raises(UserError, match="behind the last column"):
        load_masks(file)
    save_file({"a": bits[:4]}, file, metadata=about)
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_masks(file)
    save_file({"a": bits}, file, metadata=about | {"version": "2"})
    with pytest.raises(UserError, match="version 2"):
        load_masks(file)


def read_meta_of(content, folder):
    (folder / "copy.safetensors").write_bytes(content)
    return read_meta(folder / "copy.safetensors")


def test_zeros_of_a_pruned_model_are_its_masks():
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    assert masks_from_zeros(model) == {}
    name = "model.layers.1.mlp.up_proj.weight"
    mask = torch.rand(24, 16) < 0.6
    with torch.no_grad():
        model.get_parameter(name).mul_(mask)
        model.lm_head.weight[:20] = 0
        model.model.layers[0].mlp.up_proj.weight[0, :4] = 0  # below the share from which a weight counts as pruned
    found = masks_from_zeros(model)
    assert list(found) == [name] and torch.equal(found[name].to_dense(), mask)
    assert list(masks_from_zeros(model, include=["head"])) == [name, "lm_head.weight"]
    assert "model.layers.0.mlp.up_proj.weight" in masks_from_zeros(model, min_zero_share=0.01)
    pairs = {"a": model.lm_head.weight, "bias": torch.zeros(9), "ids": torch.zeros(3, 3, dtype=torch.int64)}
    assert list(masks_from_zeros(pairs.items())) == ["a"]
    stack = torch.randn(3, 4, 10) * (torch.rand(3, 4, 10) < 0.3)
    (found,) = masks_from_zeros([("experts", stack)]).values()
    assert found.shape == (3, 4, 10) and torch.equal(found.to_dense(), stack != 0)


def test_a_kept_weight_that_is_zero_stays_kept_where_a_file_says_so(tmp_path):
    mask = torch.rand(6, 20) < 0.5
    mask[0, 0] = True
    weight = torch.randn(6, 20) * mask
    weight[0, 0] = 0
    save_masks(tmp_path, {"w": mask}, {})
    assert bool(load_masks(tmp_path)["w"].to_dense()[0, 0])
    assert not bool(masks_from_zeros([("w", weight)])["w"].to_dense()[0, 0])
