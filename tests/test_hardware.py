"""Costs, peaks and facts against independent counts."""

import os
import platform
import subprocess

import psutil
import pytest
import torch
import transformers
from jobs import ROOT
from torch.utils.flop_counter import FlopCounterMode

import ds_llm.models.decoder  # noqa: F401 (registers the decoder)
from ds_llm import hardware
from ds_llm.config.sections import ModelConfig
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM

SIZES = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3}


@pytest.mark.parametrize("tied", [True, False])
def test_cost_of_a_dense_model_equals_torchs_own_count(tied):
    """Forward and backward of a Llama under torch's FLOP counter, attention over all positions."""
    config = transformers.LlamaConfig(
        **SIZES, num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=tied, attn_implementation="eager"
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, 1000, (2, 96))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    expected = counter.get_total_flops() / ids.numel()
    # the reference also multiplies positions by rotary frequencies, 16 of them per position, forward only
    assert hardware.training_flops_per_token(model, 96) == pytest.approx(expected - 16, rel=1e-3)


def test_cost_of_our_decoder_by_hand():
    """d 64, 4 heads, 2 key/value heads, MLP width 96, vocabulary 500, 2 layers, sequences of 32."""
    sizes = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, intermediate_size=96, max_seq_len=32)
    dense = DecoderForCausalLM(DecoderConfig.from_model_config(sizes, 500))
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64
    weights = 2 * (attention + 3 * 64 * 96) + 500 * 64
    assert hardware.training_flops_per_token(dense, 32) == 6 * weights + 12 * 2 * 64 * 32


def test_of_the_experts_only_the_chosen_ones_cost():
    """8 experts of width 48, 3 of them per token and 1 shared; the router is a 64 x 8 product."""
    sizes = ModelConfig(dim=64, n_layers=2, n_heads=4, max_seq_len=32, use_moe=True, n_routed_experts=8)
    sizes.num_experts_per_tok, sizes.n_shared_experts, sizes.moe_intermediate_size = 3, 1, 48
    model = DecoderForCausalLM(DecoderConfig.from_model_config(sizes, 500))
    layer = 4 * 64 * 64 + (3 + 1) * 3 * 64 * 48 + 64 * 8
    expected = 6 * (2 * layer + 500 * 64) + 12 * 2 * 64 * 32
    assert hardware.training_flops_per_token(model, 32) == pytest.approx(expected, rel=1e-12)


def test_cost_of_transformers_experts_by_hand():
    config = transformers.OlmoeConfig(**SIZES, num_attention_heads=8, num_experts=16, num_experts_per_tok=4)
    model = transformers.OlmoeForCausalLM(config)
    layer = 4 * 128 * 128 + 4 * 3 * 128 * 320 + 128 * 16
    expected = 6 * (3 * layer + 1000 * 128) + 12 * 3 * 128 * 50
    assert hardware.training_flops_per_token(model, 50) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "name, dtype, peak",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5e12),
        ("NVIDIA H100 PCIe", "bf16", 756.5e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5e12),
        ("NVIDIA H200", "fp16", 989.5e12),
        ("Tesla V100-SXM2-32GB", "fp16", 125e12),
        ("Tesla V100-SXM2-32GB", "bf16", None),  # has no bf16 tensor cores
        ("Tesla T4", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),  # another chip
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "bf16", None),  # a part of a card
        ("NVIDIA A10G", "bf16", 70e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("AMD EPYC 7763 64-Core Processor", "fp32", None),
    ],
)
def test_peak_of_a_card(name, dtype, peak):
    assert hardware.peak_flops(name, dtype) == peak


def test_environment_names_commit_and_versions():
    found = hardware.environment()
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if commit.returncode == 0:
        assert found["git"]["commit"] == commit.stdout.strip()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["transformers"] == transformers.__version__
    assert found["python"] == platform.python_version()


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory is the GPU's there")
def test_memory_is_what_the_system_says():
    block = torch.ones(50_000_000)  # 200 MB, written to
    resident = psutil.Process().memory_info().rss / 1e9
    assert abs(hardware.memory_gb() - resident) < 0.1 and hardware.memory_gb() > block.nbytes / 1e9


def test_processes_of_a_launcher_share_the_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    try:
        monkeypatch.setenv("LOCAL_SIZE", "5")
        hardware.share_cores()
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("LOCAL_SIZE", "64")
        hardware.share_cores()
        assert torch.get_num_threads() == 1
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own choice
        hardware.share_cores()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
