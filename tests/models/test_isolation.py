"""Packed documents do not see each other: a row of documents gives what each document gives alone."""

import itertools
import re

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, REFUSED, attention_of, configuration, markdown, tiny
from jobs import ROOT
from torch import nn

from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM
from ds_llm.models.documents import Documents, parts
from ds_llm.models.head import attach_loss_head, lm_loss
from ds_llm.models.isolation import LeakError, find_way, isolate, run_backbone

CPU = torch.device("cpu")


def decoder(**options) -> DecoderForCausalLM:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return DecoderForCausalLM(DecoderConfig(vocab_size=97, **size, **options)).eval()


MAKERS = {name: lambda name=name: tiny(name) for name in ARCHITECTURES}
MAKERS["decoder"] = decoder
MAKERS["decoder with windows"] = lambda: decoder(
    sliding_window=4, layer_types=["sliding_attention", "full_attention"], qk_norm=True
)
MAKERS["decoder with experts"] = lambda: decoder(use_moe=True, n_routed_experts=4, moe_intermediate_size=16)


def documents_of(lengths, vocabulary: int, rows: int = 2) -> list[list[torch.Tensor]]:
    """For each row documents of these lengths, in another order each."""
    return [[torch.randint(2, vocabulary, (n,)) for n in lengths[r:] + lengths[:r]] for r in range(rows)]


def packed(rows: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    shifted = [[torch.cat([ids[1:], torch.tensor([-100])]) for ids in row] for row in rows]
    positions = [[torch.arange(len(ids)) for ids in row] for row in rows]
    return {
        name: torch.stack([torch.cat(row) for row in values])
        for name, values in (("input_ids", rows), ("labels", shifted), ("position_ids", positions))
    }


def alone(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of a document from the library's own logits of it alone."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    return nn.functional.cross_entropy(logits, ids[1:], reduction="sum")


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict, expected: dict) -> None:
    # a bias that does not change a softmax has a gradient of rounding alone
    largest = max(value.abs().max() for value in expected.values())
    assert found.keys() >= expected.keys()
    for name, value in found.items():
        other = expected.get(name, torch.zeros_like(value))
        difference = (value - other).abs().max() / other.abs().max().clamp_min(0.01 * largest)
        assert difference < 2e-3, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("name", MAKERS)
def test_packed_equals_apart(name):
    """Summed loss and its gradients, in training, with layers computed twice, and in evaluation."""
    model = MAKERS[name]()
    rows = documents_of([6, 11, 1, 3, 8], model.get_input_embeddings().num_embeddings)
    batch = packed(rows)
    documents = [ids for row in rows for ids in row if len(ids) > 1]
    model.train()
    loss = sum(alone(model, ids) for ids in documents)
    expected = gradients(model, loss)
    attach_loss_head(model)
    found = lm_loss(model, **batch).loss_sum
    assert found.item() == pytest.approx(loss.item(), rel=2e-5)
    assert_equal(gradients(model, found), expected)
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        other = lm_loss(model, **packed(documents_of([9, 20], 64)))  # of other documents, recomputed first or last
        again = lm_loss(model, **batch).loss_sum
        assert_equal(gradients(model, again + 0 * other.loss_sum), expected)
    model.eval()
    with torch.no_grad():
        assert lm_loss(model, **batch).loss_sum.item() == pytest.approx(loss.item(), rel=2e-5)
        apart = run_backbone(model, batch["input_ids"], batch["position_ids"]).last_hidden_state
        leaking = run_backbone(model, batch["input_ids"]).last_hidden_state
    assert (leaking - apart).abs().max() > 1e-2 * apart.abs().max()  # documents that see each other would be noticed


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_apart_is_refused(name):
    config = configuration(name)
    with pytest.raises(LeakError, match=f"'{name}' models .* do not keep them apart.*set data.packing=false"):
        find_way(config, attention_of(config), CPU)


def test_a_module_that_mixes_documents_is_found_and_an_unknown_one_is_refused():
    """A model whose layers look back by a sum over the row, which no mask reaches, and one that does so by a buffer."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaMLP

    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, **size)
    plain = LlamaMLP.forward
    try:
        LlamaMLP.forward = lambda self, x: plain(self, x) + 0.1 * plain(self, x).cumsum(1)
        way = find_way(LlamaConfig(vocab_size=65, **size), "sdpa", CPU)
        assert way.modules == ("LlamaMLP",)
        LlamaMLP.forward = lambda self, x: plain(self, x) + 0.1 * plain(self, x).flip(1)  # what follows, too
        with pytest.raises(LeakError, match="'llama' models"):
            find_way(LlamaConfig(vocab_size=66, **size), "sdpa", CPU)
    finally:
        LlamaMLP.forward = plain
    model = LlamaForCausalLM(config)
    isolate(model)
    assert not parts(model)[0].packing_way.modules


def test_a_small_model_has_every_kind_of_layer_that_the_model_has():
    model = tiny("jamba")
    wanted = frozenset({type(m).__name__ for m in model.modules() if "Jamba" in type(m).__name__})
    with pytest.raises(LeakError, match=r"could not be checked \(a small model has no Nowhere"):
        find_way(configuration("jamba"), "sdpa", CPU, made_of=wanted - {"JambaForCausalLM"} | {"Nowhere"})


def test_documents_are_found_by_their_positions():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    found = Documents.of(positions)
    assert found.bounds == (0, 3, 5, 6, 12) and found.ids.tolist() == [[0, 0, 0, 1, 1, 2], [3] * 6]
    bounds = found.arguments()
    assert bounds["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 12] == bounds["cu_seq_lens_k"].tolist()
    assert bounds["max_length_q"] == bounds["max_length_k"] == 6
    assert Documents.of(torch.arange(6).expand(2, -1)) is None


def test_positions_of_one_row_are_those_of_all_rows():
    model, ids, positions = tiny("llama"), torch.randint(2, 64, (3, 12)), torch.tensor([[*range(5), *range(7)]])
    found, each = (run_backbone(model, ids, at).last_hidden_state for at in (positions, positions.expand(3, -1)))
    assert torch.equal(found, each)
    assert not torch.allclose(found, run_backbone(model, ids).last_hidden_state)


def test_padding_of_documents_run_one_by_one_is_less_than_their_tokens():
    lengths = torch.randint(1, 200, (50,)).tolist()
    found = Documents.of(torch.cat([torch.arange(n) for n in lengths])[None])
    assert sum(group.valid.numel() for group in found.groups) < 2 * sum(lengths)
    tokens = torch.cat([group.tokens for group in found.groups])
    assert sorted(tokens.tolist()) == list(range(sum(lengths)))
    for group in found.groups:
        assert torch.equal(group.take[group.valid], group.tokens)


def test_adapters_and_boosted_models_keep_documents_apart():
    from peft import LoraConfig, get_peft_model

    from ds_llm.models.boost import QwenBoostForCausalLM

    adapted = get_peft_model(tiny("qwen3_5_text"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    for module in adapted.modules():  # adapters that change something
        if "lora_B" in getattr(module, "adapter_layer_names", ()):
            nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    parts_of = [attach_loss_head(tiny(name)) for name in ("qwen3_next", "opt")]
    boosted = QwenBoostForCausalLM.from_sub_models(parts_of)
    for model in (adapted, boosted):
        rows = documents_of([6, 11, 1, 3, 8], 64)
        expected = sum(alone(model.eval(), ids) for ids in itertools.chain(*rows) if len(ids) > 1)
        attach_loss_head(model.get_base_model() if model is adapted else model)
        with torch.no_grad():
            assert lm_loss(model, **packed(rows)).loss_sum.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_page_says_how_each_architecture_keeps_documents_apart():
    page = (ROOT / "docs" / "models.md").read_text()
    count = re.search(r"(\d+) architectures are tested", (ROOT / "README.md").read_text())
    assert int(count[1]) == len(ARCHITECTURES) and f"## {len(ARCHITECTURES)} architectures of transformers" in page
    if f"of transformers {transformers.__version__}\n" in page:  # the versions of the lock file
        assert page == markdown()
