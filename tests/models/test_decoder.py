"""The decoder against transformers' Llama with the same weights, and against itself where two ways must agree."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from ds_llm.config.sections import ModelConfig
from ds_llm.kernels.rope import rope_tables
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM, DecoderModel

VOCAB = 97


def make(seed=None, scale=5.0, **options) -> DecoderForCausalLM:
    """A decoder with weights large enough that every part shows in the logits."""
    if seed is not None:
        torch.manual_seed(seed)
    values = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4} | options
    implementation = values.pop("attention", "sdpa")
    config = DecoderConfig(**values)
    config._attn_implementation = implementation
    model = DecoderForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() > 1 else 1).add_(0.01 * torch.randn_like(parameter))
    return model


MOE = {"use_moe": True, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
BOTH = pytest.mark.parametrize("extra", [{}, MOE], ids=["dense", "moe"])


def tokens(rows, length):
    return torch.randint(0, VOCAB, (rows, length))


def llama_of(model: DecoderForCausalLM) -> LlamaForCausalLM:
    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        intermediate_size=c.intermediate_size,
        max_position_embeddings=c.max_position_embeddings,
        rope_parameters=dict(c.rope_parameters),
        rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=c.tie_word_embeddings,
        attention_bias=False,
    )
    config._attn_implementation = c._attn_implementation
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(model.state_dict(), strict=True)
    return llama


@settings(max_examples=12)
@given(
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3)]),
    tied=st.booleans(),
    theta=st.sampled_from([10000.0, 5e5]),
    eps=st.sampled_from([1e-6, 1e-3]),
    attention=st.sampled_from(["sdpa", "eager"]),
    rows=st.integers(1, 3),
    length=st.integers(1, 40),
    padding=st.integers(0, 5),
)
def test_dense_decoder_equals_llama(heads, tied, theta, eps, attention, rows, length, padding):
    model = make(
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        rms_norm_eps=eps,
        attention=attention,
    )
    llama = llama_of(model)
    ids = tokens(rows, length)
    mask = torch.ones_like(ids)
    mask[0, : min(padding, length - 1)] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for extra in ({}, {"attention_mask": mask, "position_ids": positions}):
        ours, theirs = (m(input_ids=ids, output_hidden_states=True, **extra) for m in (model, llama))
        keep = mask.bool() if extra else torch.ones_like(mask, dtype=torch.bool)
        torch.testing.assert_close(ours.logits[keep], theirs.logits[keep], rtol=1e-5, atol=1e-5)
        assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
        for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            torch.testing.assert_close(a[keep], b[keep], rtol=1e-5, atol=1e-4)


def test_gradients_and_loss_equal_llama():
    model = make(num_key_value_heads=2, tie_word_embeddings=True)
    llama = llama_of(model)
    ids = tokens(3, 20)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, -100)
    for m in (model, llama):
        m.train()
    ours, theirs = model(input_ids=ids, labels=labels), llama(input_ids=ids, labels=labels)
    assert ours.logits is None  # nothing of size [tokens, vocabulary] leaves a training step
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_attention_weights_are_recorded():
    model = make(attention="eager")
    out = model(input_ids=tokens(2, 7), output_attentions=True)
    assert [a.shape for a in out.attentions] == [(2, 4, 7, 7)] * 2
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 7))
    assert not out.attentions[0].triu(1).any()


@BOTH
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_equal_separate_documents(attention, extra):
    model = make(attention=attention, num_key_value_heads=2, **extra)
    length = 40
    for row_cuts in ([[17, 18, 31], [5, 30]], [[length - 1]]):
        ids = tokens(len(row_cuts), length)
        documents = [[slice(a, b) for a, b in zip([0, *cuts], [*cuts, length], strict=True)] for cuts in row_cuts]
        positions = torch.stack([torch.cat([torch.arange(d.stop - d.start) for d in row]) for row in documents])
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        for row, parts in enumerate(documents):
            for part in parts:
                alone = model(input_ids=ids[row : row + 1, part], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, part], alone, rtol=1e-5, atol=1e-5)
        with_past = model(input_ids=ids, use_cache=False).logits
        assert (with_past - packed)[0, documents[0][-1]].abs().max() > 1e-3  # the test would see a leak


@BOTH
def test_cached_generation_equals_generation_without_cache(extra):
    model = make(num_key_value_heads=2, max_position_embeddings=64, **extra)
    ids = tokens(2, 9)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    greedy = [model.generate(ids, use_cache=cache, **options) for cache in (True, False)]
    assert greedy[0].tolist() == greedy[1].tolist() and greedy[0].shape == (2, 21)
    beams = [model.generate(ids, use_cache=cache, num_beams=3, **options) for cache in (True, False)]
    assert beams[0].tolist() == beams[1].tolist()


@BOTH
def test_logits_step_by_step_equal_one_pass(extra):
    model = make(**extra)
    ids = tokens(2, 15)
    whole = model(input_ids=ids).logits
    cache, parts = None, []
    for piece in ids.split([6, 1, 1, 5, 2], dim=1):
        out = model(input_ids=piece, cache=cache, use_cache=True)
        cache, parts = out.cache, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    last = model(input_ids=ids, logits_to_keep=3).logits
    torch.testing.assert_close(last, whole[:, -3:], rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize("tied", [True, False])
def test_saving_and_loading_by_the_auto_classes(tmp_path, tied, extra):
    model = make(tie_word_embeddings=tied, pad_token_id=1, bos_token_id=2, eos_token_id=3, **extra)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    changed = {"dtype", "architectures", "_name_or_path"}  # by saving
    values = [{k: v for k, v in c.to_dict().items() if k not in changed} for c in (config, model.config)]
    assert type(config) is DecoderConfig and values[0] == values[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is DecoderForCausalLM
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is DecoderModel
    assert list(again.state_dict()) == list(model.state_dict())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    ids = tokens(2, 11)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert torch.equal(body(input_ids=ids).last_hidden_state, model.model(input_ids=ids).last_hidden_state)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(input_ids=ids).logits.isfinite().all()


@BOTH
def test_lora_of_peft_trains_only_the_adapter(extra):
    from peft import LoraConfig, get_peft_model

    model = make(scale=1.0, **extra)
    before = copy.deepcopy(model.state_dict())
    experts = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]} if extra else {}
    settings_ = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM", **experts)
    wrapped = get_peft_model(model, settings_)
    wrapped.train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    ids = tokens(2, 16)
    losses = []
    for _ in range(8):
        loss = wrapped(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    wrapped.eval()
    adapted = wrapped(input_ids=ids).logits
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-4)
    changed = {n for n, v in merged.state_dict().items() if not torch.equal(v, before[n])}
    parts = ("q_proj", "v_proj", "o_proj") + (("experts.gate_up_proj", "experts.down_proj") if extra else ())
    assert changed == {n for n in before if any(part in n for part in parts)}


@BOTH
def test_activation_checkpointing_gives_the_same_gradients(extra):
    model = make(dropout=0.2, attention_dropout=0.1, **extra).train()
    ids = tokens(2, 16)
    gradients = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-6)


@BOTH
def test_dropout_acts_in_training_only(extra):
    model = make(dropout=0.5, **extra)
    plain = DecoderForCausalLM(DecoderConfig(**model.config.to_dict() | {"dropout": 0.0})).eval()
    plain.load_state_dict(model.state_dict())
    ids = tokens(2, 12)
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    model.train()
    # one branch at a time: the other adds zeros
    layer = model.model.layers[-1]
    branches = [layer.self_attn.o_proj.weight, layer.mlp.experts.down_proj if extra else layer.mlp.down_proj.weight]
    for weight in branches:
        silenced = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
        hidden, rope = torch.randn(1, 5, 48), rope_tables(5, 12)
        assert not torch.equal(layer(hidden, rope)[0], layer(hidden, rope)[0])
        with torch.no_grad():
            weight.copy_(silenced)
    plain.train()
    assert torch.equal(plain(input_ids=ids).logits, plain(input_ids=ids).logits)


@BOTH
def test_trainer_of_transformers_trains_and_evaluates(tmp_path, extra):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(8, 12)]
    arguments = TrainingArguments(
        tmp_path, max_steps=4, learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    trainer = Trainer(make(scale=1.0, **extra), arguments, train_dataset=rows)
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < before
    assert trainer.predict(rows).predictions.shape == (8, 12, VOCAB)


def test_experts_take_no_part_in_padding():
    model = make(attention="eager", **MOE)
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions)
    alone = [model(input_ids=ids[:1, 4:]), model(input_ids=ids[1:])]
    torch.testing.assert_close(out.logits[0, 4:], alone[0].logits[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(out.expert_counts, alone[0].expert_counts + alone[1].expert_counts)
    assert out.expert_counts.shape == (2, 6) and out.expert_counts.sum(1).tolist() == [32, 32]
    expected = (alone[0].aux_report + alone[1].aux_report) / 2  # balanced within each sequence
    torch.testing.assert_close(out.aux_report, expected, rtol=1e-5, atol=1e-6)
    scored = model(input_ids=ids, output_router_logits=True).router_logits
    assert [r.shape for r in scored] == [(20, 6)] * 2


def test_configuration_from_a_run():
    section = ModelConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, multiple_of=32, max_seq_len=77, norm_eps=1e-3)
    config = DecoderConfig.from_model_config(section, 50, pad_token_id=0, eos_token_id=2, bos_token_id=None)
    assert config.intermediate_size == 192  # 8 / 3 x 64 = 170.7, up to a multiple of 32
    assert (config.head_dim, config.num_key_value_heads, config.max_position_embeddings) == (16, 2, 77)
    assert (config.vocab_size, config.rms_norm_eps, config.eos_token_id) == (50, 1e-3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 50}, "not a multiple of 4 heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "even"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}}, "longrope"),
        ({"use_moe": True, "n_routed_experts": 2, "num_experts_per_tok": 3}, "more than n_routed_experts"),
        ({"num_hidden_layers": "two"}, "expected int, got str"),
        ({"scoring_func": "relu"}, "softmax or sigmoid"),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        DecoderConfig(**{"vocab_size": VOCAB, "hidden_size": 48, "num_attention_heads": 4} | options)


def test_initial_weights_have_the_stated_spread():
    config = DecoderConfig(vocab_size=512, hidden_size=128, num_hidden_layers=8, **MOE)
    model = DecoderForCausalLM(config)
    layer, dense = model.model.layers[3], DecoderForCausalLM(DecoderConfig(hidden_size=128)).model.layers[3]
    for weight, std in (
        (model.model.embed_tokens.weight, 0.02),
        (layer.self_attn.q_proj.weight, 0.02),
        (layer.self_attn.o_proj.weight, 0.02 / 4),
        (dense.mlp.up_proj.weight, 0.02),
        (dense.mlp.down_proj.weight, 0.02 / 4),
        (layer.mlp.gate.weight, 0.02),
        (layer.mlp.experts.gate_up_proj, 0.02),
        (layer.mlp.experts.down_proj, 0.02 / 4),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.15)
    assert torch.equal(layer.input_layernorm.weight, torch.ones(128))
