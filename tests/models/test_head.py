"""The loss head against F.cross_entropy on full logits, for the project's decoder and for models of transformers."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from ds_llm.errors import UserError
from ds_llm.models import head as head_module
from ds_llm.models.backbone import backbone
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM
from ds_llm.models.head import LMHead, attach_loss_head, head_loss, lm_loss

SMALL = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": None},
    "OPT": {"ffn_dim": 40, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "GPT2": {"n_positions": 64},
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.05},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.05},
}


def family(name: str) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**SMALL | FAMILIES[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def ragged(rows: int, length: int, vocab: int, kept: float = 0.6):
    labels = torch.randint(0, vocab, (rows, length)).masked_fill(torch.rand(rows, length) > kept, -100)
    labels[0] = -100
    return labels


class Wrapped(nn.Module):
    """A head inside another module, as adapters have it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.delta = inner, nn.Linear(inner.in_features, inner.out_features, bias=False)

    def forward(self, hidden):
        return self.inner(hidden) + self.delta(hidden)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 50),
    kept=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 1.5]),
    scale=st.sampled_from([1.0, 0.3]),
    wrapped=st.booleans(),
)
def test_head_loss_equals_cross_entropy_of_full_logits(rows, length, kept, bias, softcap, scale, wrapped):
    head = LMHead(16, 61, bias=bias)
    head.softcap, head.logit_scale = softcap, scale
    whole = Wrapped(head) if wrapped else head
    hidden = torch.randn(rows, length, 16, requires_grad=True)
    labels = ragged(rows, length, 61, kept)
    parameters = [hidden, *whole.parameters()]
    found = head_loss(whole, hidden, labels)
    gradients = torch.autograd.grad(found * 0.7, parameters)
    logits = whole(hidden).double() * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, torch.autograd.grad(expected * 0.7, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_wrapped_head_computes_in_chunks(monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_TOKENS", 7)
    seen = []
    head = Wrapped(LMHead(8, 30, bias=False))
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    hidden, labels = torch.randn(3, 9, 8, requires_grad=True), ragged(3, 9, 30)
    loss = head_loss(head, hidden, labels)
    loss.backward()
    assert max(seen) == 7 and sum(seen) == 2 * 27  # once forward, once again in the backward pass
    torch.testing.assert_close(loss, F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum"))


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_of_a_transformers_model_equals_that_of_its_logits(name):
    model = family(name)
    keys = list(model.state_dict())
    ids, labels = torch.randint(3, 83, (3, 17)), ragged(3, 17, 83)
    model.zero_grad()
    expected = F.cross_entropy(model(input_ids=ids).logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    assert attach_loss_head(model) is model and list(model.state_dict()) == keys
    found = lm_loss(model, ids, labels)
    found.loss_sum.backward()
    torch.testing.assert_close(found.loss_sum, expected, rtol=1e-5, atol=1e-4)
    for n, parameter in model.named_parameters():
        if gradients[n] is None:
            assert parameter.grad is None
            continue
        torch.testing.assert_close(parameter.grad, gradients[n], rtol=1e-3, atol=1e-4, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", ["Olmoe", "Mixtral"])
def test_balancing_loss_of_transformers_experts(name):
    model = attach_loss_head(family(name))
    ids = torch.randint(3, 83, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    found = lm_loss(model, ids, ids, attention_mask=mask)
    theirs = model(input_ids=ids, attention_mask=mask, labels=ids, output_router_logits=True)
    torch.testing.assert_close(found.aux_loss, 0.05 * theirs.aux_loss)
    torch.testing.assert_close(found.aux_report, theirs.aux_loss.detach() / 2)
    assert found.expert_counts.shape == (2, 4) and found.expert_counts.sum(1).tolist() == [2 * 19] * 2


def test_loss_of_the_decoder():
    config = DecoderConfig(
        vocab_size=83, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, use_moe=True, n_routed_experts=4
    )
    model = DecoderForCausalLM(config).train()
    assert attach_loss_head(model) is model
    ids, labels = torch.randint(0, 83, (2, 14)), ragged(2, 14, 83)
    found = lm_loss(model, ids, labels)
    out = model.model(input_ids=ids, use_cache=False)
    logits = model.lm_head(out.last_hidden_state)
    torch.testing.assert_close(
        found.loss_sum, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(found.aux_loss, out.aux_loss)
    assert found.aux_loss.item() == pytest.approx(0.01 * 2 * found.aux_report.item(), rel=1e-5)  # sum of two layers
    assert found.expert_counts.shape == (2, 4) and found.expert_counts.sum(1).tolist() == [2 * 28] * 2
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    whole = model(input_ids=ids, labels=ids).loss
    again = lm_loss(model, ids, shifted)
    torch.testing.assert_close(whole, again.loss_sum / (2 * 13) + again.aux_loss)


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_loss_through_a_peft_adapter(target):
    from peft import LoraConfig, get_peft_model

    config = DecoderConfig(
        vocab_size=83, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, tie_word_embeddings=False
    )
    settings_ = LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(attach_loss_head(DecoderForCausalLM(config)), settings_)
    ids, labels = torch.randint(0, 83, (2, 14)), ragged(2, 14, 83)
    found = lm_loss(model, ids, labels).loss_sum
    expected = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_heads_that_do_not_fit_are_refused():
    model = family("Llama")
    model.lm_head = nn.Sequential(nn.Linear(32, 83))
    with pytest.raises(UserError, match="not a linear layer"):
        attach_loss_head(model)
    model = family("Gemma2")
    forward = model.forward
    model.forward = lambda **kwargs: (out := forward(**kwargs), setattr(out, "logits", out.logits + 3))[0]
    with pytest.raises(UserError, match="not a linear function"):
        attach_loss_head(model)


def test_prompt_learning_is_refused():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(family("Llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UserError, match="prompt-learning"):
        backbone(model)
