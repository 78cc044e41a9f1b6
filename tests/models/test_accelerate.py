"""Accelerated transformers models compute what the untouched ones do."""

import copy

import pytest
import torch
import transformers

from ds_llm.models import accelerate
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM

SIZE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 3}
MODELS = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {**MOE, "head_dim": 8, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmoe": {**MOE, "norm_topk_prob": False},
}


def build(name: str, **kwargs):
    config = getattr(transformers, f"{name}Config")(**SIZE, **MODELS[name], **kwargs)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and gains that matter
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(rows: int = 2, length: int = 19) -> dict:
    ids = torch.randint(1, 61, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def run(model, inputs: dict, **kwargs):
    model.zero_grad(set_to_none=True)
    out = model(**inputs, **kwargs)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_gradients_are_those_of_the_untouched_model(name):
    model = build(name)
    changed = copy.deepcopy(model)
    report = accelerate(changed)
    moe = "num_experts_per_tok" in MODELS[name]
    assert (report.rope, report.routers, report.experts) == (2, 2 * moe, 2 * moe)
    assert report.note is None and "2 rope" in str(report)
    inputs = batch()
    kwargs = {"output_router_logits": True} if moe else {}
    (out, grads), (out2, grads2) = run(model, inputs, **kwargs), run(changed, inputs, **kwargs)
    torch.testing.assert_close(out2.logits, out.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out2.loss, out.loss, rtol=1e-5, atol=1e-6)
    if moe:
        assert len(out2.router_logits) == 2
        torch.testing.assert_close(out2.aux_loss, out.aux_loss)
    assert grads.keys() == grads2.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(grads2[key], grad, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["Llama", "Olmoe"])
def test_packed_positions_checkpointing_and_generation_agree(name):
    model = build(name, attn_implementation="eager")
    changed = copy.deepcopy(model)
    accelerate(changed)
    ids = torch.randint(1, 61, (1, 16))
    # transformers looks for packed documents only where there is no cache
    packed = {"input_ids": ids, "position_ids": torch.tensor([[*range(7), *range(9)]]), "labels": ids}
    packed["use_cache"] = False
    out, grads = run(model, packed)
    changed.train()
    changed.gradient_checkpointing_enable({"use_reentrant": False})
    out2, grads2 = run(changed, packed)
    torch.testing.assert_close(out2.loss, out.loss, rtol=1e-5, atol=1e-6)
    for key, grad in grads.items():
        torch.testing.assert_close(grads2[key], grad, rtol=1e-3, atol=1e-5)
    changed.gradient_checkpointing_disable()
    prompt = batch()
    prompt.pop("labels")
    texts = [m.eval().generate(**prompt, max_new_tokens=6, do_sample=False) for m in (model, changed)]
    assert torch.equal(*texts)


def test_bfloat16_stays_close(tmp_path):
    model = build("Olmoe").bfloat16()
    changed = copy.deepcopy(model)
    accelerate(changed)
    exact = copy.deepcopy(model).float()
    inputs = batch()
    want, plain, ours = (m(**inputs).logits.float() for m in (exact, model, changed))
    # routing of near ties may differ in a token or two, so medians are compared
    assert ours.dtype == plain.dtype and (ours - want).abs().median() < 2 * (plain - want).abs().median() + 1e-3


def test_other_models_of_the_process_stay_untouched_and_copies_keep_the_kernels(tmp_path):
    first, second = build("Llama"), build("Llama")
    original = type(second.model.layers[0].self_attn)
    accelerate(first)
    attention = first.model.layers[0].self_attn
    assert type(attention) is not original and isinstance(attention, original)
    assert type(second.model.layers[0].self_attn) is original
    assert type(copy.deepcopy(first).model.layers[0].self_attn) is type(attention)
    first.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.model.layers[0].self_attn) is original
    ids = torch.randint(1, 61, (1, 9))
    torch.testing.assert_close(loaded(ids).logits, first(ids).logits, rtol=1e-4, atol=1e-5)


def test_accelerating_twice_or_a_model_without_such_modules_changes_nothing():
    model = build("Mixtral")
    accelerate(model)
    again = accelerate(model)
    assert (again.rope, again.routers, again.experts) == (0, 0, 0) and "already" in str(again)
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    other = accelerate(transformers.GPT2LMHeadModel(config))
    assert other.rope == 0 and "GPT2LMHeadModel has no attention" in str(other)
    own = DecoderForCausalLM(DecoderConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    assert "uses the kernels already" in str(accelerate(own))


def test_experts_keep_an_implementation_that_was_asked_for():
    model = build("Qwen3Moe", experts_implementation="batched_mm")
    report = accelerate(model)
    assert (report.rope, report.routers, report.experts) == (2, 2, 0)
    assert "keep the implementation" in str(report)
