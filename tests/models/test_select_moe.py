"""Select-MoE models against the models they were made of and against their definition written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from gated import KINDS, convert, save
from jobs import VOCAB
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from ds_llm.errors import UserError
from ds_llm.models import accelerate
from ds_llm.models.head import attach_loss_head, lm_loss
from ds_llm.models.quality_gate import TRASH, QualityGate, gates, open_gates, record_scores, register_trash
from ds_llm.models.select_moe import SelectMoeConfig, SelectMoeForCausalLM
from ds_llm.pretrained.loading import load_model


@pytest.fixture(scope="module", params=KINDS)
def pair(request, corpus, tmp_path_factory):
    """Folders of a model and of the Select-MoE model made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    source = save(request.param, folder / "original", corpus / "tokenizer", VOCAB)
    return source, convert(source, folder / "gated")


def tokens(rows: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length))


def written_out(original: nn.Module, weights: list[torch.Tensor]) -> nn.Module:
    """The original with y = g MoE(x) + (1 - g) 0 in every layer with experts, by hooks."""
    blocks = [layer.mlp for layer in original.model.layers if hasattr(layer.mlp, "experts")]
    for block, weight in zip(blocks, weights, strict=True):

        def gate(_, args, out, weight=weight):
            good = 1 / (1 + torch.exp(-(args[0].double() @ weight.double().T)))
            first = out[0] if isinstance(out, tuple) else out
            gated = (good * first.double()).float()
            return (gated, *out[1:]) if isinstance(out, tuple) else gated

        block.register_forward_hook(gate)
    return original


@torch.no_grad()
def test_open_gates_change_no_bit_and_others_do_what_they_should(pair):
    ids = tokens()
    original, gated = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in pair)
    assert type(gated) is SelectMoeForCausalLM
    assert AutoConfig.from_pretrained(pair[1]).text_config.model_type == original.config.model_type
    expected = original(input_ids=ids).logits
    with open_gates(gated):
        assert torch.equal(gated(input_ids=ids).logits, expected)
    found = gated(input_ids=ids).logits
    assert (found - expected).abs().max() > 0.1
    reference = written_out(original, [gate.weight for gate in gates(gated)])
    torch.testing.assert_close(found, reference(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_scores_and_router_logits_come_on_request(pair):
    ids, gated = tokens(), AutoModelForCausalLM.from_pretrained(pair[1]).eval()
    inputs = []
    for gate in gates(gated):
        gate.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    out = gated(input_ids=ids, output_quality_scores=True, output_router_logits=True)
    count = len(gates(gated))
    assert [score.shape for score in out.quality_scores] == [(2, 13, 1)] * count
    assert [logits.shape for logits in out.router_logits] == [(26, 5)] * count
    for score, logits, gate, hidden, layer in zip(
        out.quality_scores, out.router_logits, gates(gated), inputs, experts_of(gated), strict=True
    ):
        torch.testing.assert_close(score, hidden @ gate.weight.T)
        torch.testing.assert_close(logits, hidden.flatten(0, 1) @ layer.gate.weight.T)
        # what gates and experts see is normalised: root mean square 1
        torch.testing.assert_close(hidden.square().mean(-1), torch.ones(2, 13), rtol=1e-3, atol=1e-3)
    assert gated(input_ids=ids).quality_scores is None
    with record_scores() as found:
        gated(input_ids=ids)
    assert all(torch.equal(a, b) for a, b in zip(found, out.quality_scores, strict=True))


def experts_of(model):
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]


@torch.no_grad()
def test_a_cache_and_other_rows_change_no_answer(pair):
    config = AutoConfig.from_pretrained(pair[1])
    config.trash_expert = "noise"
    gated = AutoModelForCausalLM.from_pretrained(pair[1], config=config).eval()
    ids = tokens(3)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached, whole = (gated.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, whole)
    alone = gated(input_ids=ids[1:2]).logits
    torch.testing.assert_close(gated(input_ids=ids).logits[1:2], alone, rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_it_is_the_same_model(pair, tmp_path):
    gated = load_model(pair[1])
    gated.save_pretrained(tmp_path / "again")
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "again")(ids).logits, gated(ids).logits)
    # an original's files give a Select-MoE model with new gates of the asked spread
    config = SelectMoeConfig(text_config=AutoConfig.from_pretrained(pair[0]).to_dict(), quality_gate_init_std=3.0)
    fresh = SelectMoeForCausalLM.from_pretrained(pair[0], config=config)
    assert 2 < torch.cat([gate.weight.flatten() for gate in gates(fresh)]).std() < 4
    with torch.no_grad(), open_gates(fresh):
        assert torch.equal(fresh(ids).logits, load_model(pair[0])(ids).logits)


def test_the_loss_has_each_term_once_and_no_padding(pair):
    gated = load_model(pair[1]).train()
    gated.config.quality_loss_weight, gated.config.quality_loss_type = 0.7, "mse"
    gated.config.set_load_balancing_weight(0.3)
    for block in experts_of(gated):
        if hasattr(block, "aux_loss_alpha"):
            block.aux_loss_alpha, block.seq_aux = 0.3, False
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    out = gated(input_ids=ids, labels=ids, attention_mask=mask, output_quality_scores=True, output_router_logits=True)
    gated.eval()
    logits = gated(input_ids=ids).logits
    language = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    quality = torch.stack(out.quality_scores).sigmoid().square().mean()
    chosen = [F.one_hot(scores.topk(2).indices, 5).float().sum(1).mean(0) for scores in out.router_logits]
    given = [scores.softmax(-1).mean(0) for scores in out.router_logits]
    if hasattr(experts_of(gated)[0], "aux_loss_alpha"):
        balance = sum(5 * (c * g).sum() / 2 for c, g in zip(chosen, given, strict=True))
    else:  # transformers pools the layers, and does not divide by the number of choices
        balance = 5 * (sum(chosen) / len(chosen) * sum(given) / len(given)).sum()
    torch.testing.assert_close(out.loss, language + 0.3 * balance + 0.7 * quality, rtol=1e-5, atol=1e-5)
    # the same rows behind padding lose nothing and gain nothing
    gated.train()
    padded = F.pad(ids, (4, 0), value=0)
    labels, mask = F.pad(ids[:, 1:], (5, 0), value=-100), F.pad(mask, (4, 0))
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    again = gated(input_ids=padded, labels=labels, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(again.quality_loss, out.quality_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.loss, out.loss, rtol=1e-4, atol=1e-4)


def test_kernels_and_recomputation_change_no_gradient(pair):
    ids = tokens()
    found = {}
    for way in ("plain", "kernels", "recomputed"):
        gated = load_model(pair[1]).train()
        if way == "kernels":
            accelerate(gated)
        if way == "recomputed":
            gated.gradient_checkpointing_enable({"use_reentrant": False})
        attach_loss_head(gated)
        with record_scores() as scores:
            loss = lm_loss(gated, ids[:, :-1], ids[:, 1:])
        assert len(scores) == len(gates(gated))
        (loss.loss_sum + loss.aux_loss + sum(score.sigmoid().mean() for score in scores)).backward()
        found[way] = {name: p.grad for name, p in gated.named_parameters() if p.grad is not None}
    for way in ("kernels", "recomputed"):
        assert found[way].keys() == found["plain"].keys()
        for name, expected in found["plain"].items():
            torch.testing.assert_close(found[way][name], expected, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)


@torch.no_grad()
def test_trash_experts():
    x, out = torch.randn(4, 300, 64) * 3 + 1, torch.randn(4, 300, 64)
    gate = QualityGate(64, "noise", layer=3)
    good = torch.sigmoid(x @ gate.weight.T)
    for training in (False, True):
        trash = (gate.train(training)(x, out) - good * out) / (1 - good)
        if training:
            difference = trash.mean(-1) - x.mean(-1)
            assert difference.std() * 8 == pytest.approx(float(x.std(-1).mean()), rel=0.2)  # that of a mean of 64
            assert not torch.equal(gate(x, out), gate(x, out))
        else:
            torch.testing.assert_close(trash.mean(-1), x.mean(-1), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(trash.std(-1, correction=0), x.std(-1, correction=0), rtol=1e-3, atol=1e-3)
            assert torch.equal(gate(x, out), gate(x, out))
    torch.testing.assert_close(QualityGate(64, "zero").quality_score(x).shape, torch.Size([4, 300, 1]))
    with pytest.raises(UserError, match="did you mean noise"):
        QualityGate(64, "nois")


def test_a_registered_trash_expert_is_trained_and_saved(pair, tmp_path):
    @register_trash("linear")
    def linear(hidden_size: int, layer: int) -> nn.Module:
        return nn.Linear(hidden_size, hidden_size, bias=False)

    try:
        folder = convert(pair[0], tmp_path / "custom", trash="linear")
        gated, ids = load_model(folder), tokens()
        before = gated(ids).logits
        with open_gates(gated), torch.no_grad():
            assert torch.equal(gated(ids).logits, load_model(pair[0])(ids).logits)
        before.sum().backward()
        assert all(gate.trash.weight.grad.abs().sum() > 0 for gate in gates(gated))
        gated.save_pretrained(tmp_path / "again")
        with torch.no_grad():
            assert torch.equal(load_model(tmp_path / "again")(ids).logits, before)
    finally:
        del TRASH["linear"]
    with pytest.raises(UserError, match="trash expert 'linear'"):
        load_model(folder)


def test_a_model_without_experts_is_refused():
    text = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50, intermediate_size=32)
    with pytest.raises(UserError, match="a 'llama' model has no experts"):
        SelectMoeForCausalLM(SelectMoeConfig(text_config=copy.deepcopy(text).to_dict()))
    with pytest.raises(ValueError, match="text_config"):
        SelectMoeConfig()
