"""Packs and groups: every document once, within the limit, and the same loss and gradients as document by document."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ds_llm.data.packing import BLOCK, GroupedSamples, PackedSamples, first_fit_decreasing, group_by_length
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM
from ds_llm.models.head import attach_loss_head, lm_loss

CAPACITIES = st.integers(1, 200)


@st.composite
def problems(draw, most: int = 400):
    capacity = draw(CAPACITIES)
    return draw(st.lists(st.integers(1, capacity), max_size=most)), capacity


def naive(lengths: list[int], capacity: int) -> list[list[int]]:
    bins, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = (b for b, left in enumerate(room) if left >= lengths[i])
        b = next(fitting, len(bins))
        if b == len(bins):
            bins.append([])
            room.append(capacity)
        bins[b].append(i)
        room[b] -= lengths[i]
    return bins


@settings(max_examples=150)
@given(problems())
def test_packs_are_those_of_first_fit_decreasing(problem):
    lengths, capacity = problem
    assert first_fit_decreasing(lengths, capacity) == naive(lengths, capacity)


def test_packs_over_many_blocks_of_bins():
    random = np.random.default_rng()
    lengths = random.integers(1, 65, 12 * BLOCK)
    packs = first_fit_decreasing(lengths, 64)
    assert packs == naive(lengths.tolist(), 64) and len(packs) > 4 * BLOCK
    print(f"fill {lengths.sum() / (64 * len(packs)):.4f}")


@settings(max_examples=100)
@given(problems())
def test_groups_hold_every_document_within_the_budget(problem):
    lengths, tokens = problem
    groups = group_by_length(lengths, tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group, following in pairwise([*groups, None]):
        longest = max(lengths[i] for i in group)
        assert len(group) * longest <= tokens
        if following:  # the next document is no longer than these and would not have fitted
            assert max(lengths[i] for i in following) <= min(lengths[i] for i in group)
            assert (len(group) + 1) * longest > tokens


@pytest.mark.parametrize("plan", [first_fit_decreasing, group_by_length])
@pytest.mark.parametrize("lengths", [[3, 0], [3, 11], [[1], [2]]])
def test_impossible_lengths_are_refused(plan, lengths):
    with pytest.raises(ValueError, match="from 1 to the"):
        plan(lengths, 10)


class Documents:
    """Random documents of 1 to `longest` tokens whose first third carries no label."""

    def __init__(self, count: int, longest: int, vocab: int):
        random = np.random.default_rng()
        self.lengths = random.integers(1, longest + 1, count)
        self.ids = [random.integers(0, vocab, n) for n in self.lengths]

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.append(self.ids[i][1:], -100)
        labels[: len(labels) // 3] = -100
        return self.ids[i], labels


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
POSITIONS = {"max_position_embeddings": 64}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48))


def qwen3_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **experts, intermediate_size=48))


def decoder(use_moe: bool = False):
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 16}
    config = DecoderConfig(**SMALL, intermediate_size=48, use_moe=use_moe, **experts)
    return DecoderForCausalLM(config)


MODELS = {"llama": llama, "qwen3_moe": qwen3_moe, "decoder": decoder, "decoder_moe": lambda: decoder(True)}


def gradients(model, batches) -> tuple[float, dict]:
    """Summed language-model loss of the batches and its gradients; the routers' own losses are no sums over
    documents."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = lm_loss(model, **batch).loss_sum
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_packs_and_groups_give_the_sums_over_their_documents(name):
    torch.manual_seed(np.random.default_rng().integers(1 << 30))
    model = attach_loss_head(MODELS[name]()).train()
    documents = Documents(20, 24, SMALL["vocab_size"])
    single = [{k: torch.from_numpy(v)[None] for k, v in zip(("input_ids", "labels"), documents.example(i), strict=True)}
              for i in range(20)]  # fmt: skip
    expected, reference = gradients(model, single)
    packed = PackedSamples(documents, 40, pad_token_id=1)
    halves = np.array_split(np.arange(len(packed)), 2)
    grouped = GroupedSamples(documents, 60, pad_token_id=1)
    for batches in ([packed.batch(half) for half in halves], [grouped.batch([i]) for i in range(len(grouped))]):
        loss, found = gradients(model, batches)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert found.keys() == reference.keys()
        for key, value in reference.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5 * float(value.abs().max() + 1), msg=key)


@pytest.mark.parametrize("name", ["qwen3_moe", "decoder_moe"])
def test_padding_of_packs_takes_no_part_in_routing(name):
    torch.manual_seed(0)
    model = attach_loss_head(MODELS[name]()).train()
    documents = Documents(2, 20, SMALL["vocab_size"])
    documents.lengths, documents.ids = (
        np.array([20, 7]),
        [documents.ids[0][:1].repeat(20), documents.ids[1][:1].repeat(7)],
    )
    batch = PackedSamples(documents, 20, pad_token_id=1).batch([0, 1])
    assert (~batch["token_mask"]).sum() == 13
    with torch.no_grad():
        counts = lm_loss(model, **batch).expert_counts
        batch["input_ids"][~batch["token_mask"]] = 5
        again = lm_loss(model, **batch)
    assert counts.sum(-1).tolist() == [2 * 27] * 2
    assert torch.equal(again.expert_counts, counts)


def test_batches_carry_positions_masks_and_labels():
    documents = Documents(9, 8, 50)
    packed = PackedSamples(documents, 10, pad_token_id=3)
    assert packed.fill == pytest.approx(documents.lengths.sum() / (10 * len(packed)))
    batch = packed.batch(range(len(packed)))
    mask = batch.get("token_mask", torch.ones_like(batch["labels"], dtype=torch.bool))
    assert int(mask.sum()) == documents.lengths.sum() and (batch["input_ids"][~mask] == 3).all()
    assert (batch["labels"][~mask] == -100).all()
    starts = int((batch["position_ids"] == 0).sum())
    assert starts == len(documents) + int((~mask).any(-1).sum())
    supervised = sum((documents.example(i)[1] != -100).sum() for i in range(9))
    assert int((batch["labels"] != -100).sum()) == supervised
    grouped = GroupedSamples(documents, 16, pad_token_id=3)
    batches = [grouped.batch([i]) for i in range(len(grouped))]
    assert sum(int(b["attention_mask"].sum()) for b in batches) == documents.lengths.sum()
    assert sum(b["input_ids"].numel() for b in batches) == pytest.approx(documents.lengths.sum() / grouped.fill)
    assert sum(int((b["labels"] != -100).sum()) for b in batches) == supervised
