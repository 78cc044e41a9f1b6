"""Boosted models: the vote, the loss, the connection, caches and files, each against plain transformers models."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ds_llm.errors import UserError
from ds_llm.models.boost import QwenBoostConfig, QwenBoostForCausalLM
from ds_llm.models.head import attach_loss_head, lm_loss
from ds_llm.pretrained.loading import load_model, load_model_config
from ds_llm.pretrained.source import detect_model_type

VOCAB = 97
KINDS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def model(kind: str = "qwen2", layers: int = 2, **options):
    config, architecture = KINDS[kind]
    size = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
    size |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64}
    made = architecture(config(**{**size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, **options}))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def fused(*models, **options) -> QwenBoostForCausalLM:
    return QwenBoostForCausalLM.from_sub_models([copy.deepcopy(m) for m in models], **options).eval()


def randomise_connection(boosted, std: float = 0.3) -> None:
    for name, parameter in boosted.named_parameters():
        if ".prev_" in name:
            torch.nn.init.normal_(parameter, std=std)


def tokens(rows: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length))


@pytest.mark.parametrize("kind, tied", [("qwen2", True), ("qwen3", False), ("llama", True)])
@pytest.mark.parametrize("count", [2, 3])
def test_logits_are_the_vote_before_and_after_saving(kind, tied, count, tmp_path):
    models = [model(kind, tie_word_embeddings=tied), *(model(kind) for _ in range(count - 1))]
    boosted, ids = fused(*models, fusion_lambda=0.3 if count == 2 else 0.5), tokens()
    weights = [0.7, 0.3] if count == 2 else [1 / 3] * 3
    expected = sum(w * m(ids).logits.double() for w, m in zip(weights, models, strict=True))
    boosted.save_pretrained(tmp_path)
    read, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(read) is QwenBoostForCausalLM and not found["missing_keys"] and not found["unexpected_keys"]
    for one in (boosted, read.eval()):
        torch.testing.assert_close(one(ids).logits.double(), expected, rtol=1e-5, atol=1e-5)
    assert all(name.startswith("sub_models.") for name in read.state_dict())
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["num_sub_models"] == count and len(written["sub_model_cfgs"]) == count
    head, embedding = (getattr(read.sub_models[0], f"get_{end}_embeddings")() for end in ("output", "input"))
    assert (head.weight is embedding.weight) == tied


@pytest.mark.parametrize("connection", [None, "linear", "gated"])
def test_loss_and_gradients_are_those_of_the_mixed_logits(connection):
    boosted = attach_loss_head(fused(model(), model(), fusion_lambda=0.4, connection=connection)).train()
    randomise_connection(boosted)
    boosted.sub_models[0].requires_grad_(False)
    ids, labels = tokens(3, 13), tokens(3, 13)
    labels[torch.rand(labels.shape) < 0.3] = -100
    found = lm_loss(boosted, ids, labels, per_row=True).loss_sum
    logits = boosted(ids).logits.double()
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    )
    torch.testing.assert_close(found.double(), each.view(3, -1).sum(-1), rtol=1e-5, atol=1e-5)
    learning = {n: p for n, p in boosted.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(each.sum(), learning.values())
    lm_loss(boosted, ids, labels).loss_sum.backward()
    assert all(p.grad is None for p in boosted.sub_models[0].parameters())
    for (name, parameter), gradient in zip(learning.items(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4, msg=name)
    shifted = boosted.eval()(input_ids=ids, labels=ids)
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(shifted.loss.double(), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("connection", ["linear", "gated"])
def test_connection_adds_what_the_predecessor_sees(kind, connection):
    """A model of one layer that is fed by its twin sees p = h, so W_prev simply adds to its own weight."""
    first = model(kind, layers=1)
    boosted, ids = fused(first, first, fusion_lambda=1.0, connection=connection), tokens()
    torch.testing.assert_close(boosted(ids).logits, first(ids).logits)  # it begins without effect
    randomise_connection(boosted)
    share = 1.0
    if connection == "gated":
        share = 0.5
        for name, parameter in boosted.named_parameters():
            if name.endswith("_gate.weight"):
                torch.nn.init.zeros_(parameter)
    expected, theirs = copy.deepcopy(first), boosted.sub_models[1].model.layers[0].self_attn
    for letter in "qkv":
        weight = getattr(expected.model.layers[0].self_attn, f"{letter}_proj").weight
        weight.data += share * getattr(theirs, f"prev_{letter}_proj").weight
    torch.testing.assert_close(boosted(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    if connection == "gated":  # an open gate lets twice as much through: sigmoid(h w) -> 1 with h w large
        gate = theirs.prev_q_gate.weight
        hidden = first.model.layers[0].input_layernorm(first.model.embed_tokens(ids))
        torch.nn.init.normal_(gate)
        added = torch.sigmoid(hidden @ gate.T) * (hidden @ theirs.prev_q_proj.weight.T)
        seen = []
        theirs.q_proj.register_forward_hook(lambda _, args, out: seen.append(out))
        boosted(ids)
        torch.testing.assert_close(
            seen[0], first.model.layers[0].self_attn.q_proj(hidden) + added, rtol=1e-4, atol=1e-4
        )


def test_recomputed_layers_are_fed_again():
    boosted = attach_loss_head(fused(model(), model(), connection="gated")).train()
    randomise_connection(boosted)
    ids = tokens()
    gradients = []
    for recompute in (False, True):
        if recompute:
            boosted.gradient_checkpointing_enable({"use_reentrant": False})
        boosted.zero_grad()
        lm_loss(boosted, ids, ids).loss_sum.backward()
        gradients.append({n: p.grad.clone() for n, p in boosted.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    feeds = [layer.self_attn.q_proj.feed for layer in boosted.sub_models[1].model.layers]
    assert all(feed.hidden is None for feed in feeds)


@pytest.mark.parametrize("connection", [None, "linear"])
def test_generation_with_caches_is_generation_without(connection):
    boosted = fused(model("qwen3"), model("qwen3"), connection=connection)
    randomise_connection(boosted)
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        plain = {k: v for k, v in options.items() if k != "cache_implementation"}
        settings = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
        with_cache = boosted.generate(ids, **settings, **options)
        without = boosted.generate(ids, **settings, **plain, use_cache=False)
        assert torch.equal(with_cache, without)
    alone = boosted.generate(ids[1:2, 4:], max_new_tokens=10, do_sample=False)
    assert torch.equal(
        alone[0, 5:], boosted.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)[1, 9:]
    )


def test_packed_documents_are_apart():
    boosted = fused(model(), model("llama"), connection="linear")
    randomise_connection(boosted)
    one, two = tokens(1, 6), tokens(1, 8)
    positions = torch.cat([torch.arange(6), torch.arange(8)])[None]
    together = boosted(torch.cat([one, two], 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together[:, 6:], boosted(two).logits, rtol=1e-4, atol=1e-4)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(Exception, match="vocabularies differ"):
        fused(model(), model(vocab_size=98))
    with pytest.raises(ValueError, match="2 layers cannot be fed by one of 1"):
        fused(model(layers=1), model(), connection="linear")
    with pytest.raises(Exception, match=r"fusion_lambda: 1\.5"):
        fused(model(), model(), fusion_lambda=1.5)


# --- files


def rewrite(folder: Path, **changes) -> None:
    values = json.loads((folder / "config.json").read_text())
    values = {k: v for k, v in {**values, **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_sub_models": None, "num_submodels": 2},
        {"model_type": "qwen2", "num_sub_models": None},
        {"num_sub_models": None, "fusion_lambda": None, "ensemble_config": {"num_submodels": 2, "fusion_lambda": 0.2}},
    ],
)
def test_either_spelling_is_read(changes, tmp_path):
    boosted, ids = fused(model(), model(), fusion_lambda=0.2), tokens()
    boosted.save_pretrained(tmp_path)
    rewrite(tmp_path, **changes)
    assert detect_model_type(tmp_path) == "qwen_boost"
    read = load_model(tmp_path)
    assert read.config.num_submodels == 2 and read.config.vote == pytest.approx([0.8, 0.2])
    torch.testing.assert_close(read(ids).logits, boosted(ids).logits)


def test_a_file_without_sub_configurations_has_sub_models_of_its_own_architecture(tmp_path):
    boosted, ids = fused(model(), model()), tokens()
    boosted.save_pretrained(tmp_path)
    values = model().config.to_dict() | {"num_submodels": 2, "architectures": ["QwenBoostForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    torch.testing.assert_close(load_model(tmp_path)(ids).logits, boosted(ids).logits)


@pytest.mark.parametrize(
    "config, file, kind",
    [
        ({}, None, "standard"),
        ({"num_submodels": 2}, None, "qwen_boost"),
        ({"num_sub_models": 2}, None, "qwen_boost"),
        ({"ensemble_config": {}}, None, "qwen_boost"),
        ({"architectures": ["MyEnsembleLM"]}, None, "qwen_boost"),
        ({"architectures": ["Qwen2ForCausalLM"]}, None, "standard"),
        ({}, "submodel_weights.json", "qwen_boost"),
        ({}, "ensemble_weights.json", "qwen_boost"),
    ],
)
def test_detection(config, file, kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if file:
        (tmp_path / file).write_text("{}")
    assert detect_model_type(tmp_path) == kind


def test_what_only_seems_to_be_boosted_is_loaded_as_a_standard_model(tmp_path, capsys):
    plain, ids = model(), tokens()
    plain.save_pretrained(tmp_path)
    rewrite(tmp_path, num_submodels=2)
    read = load_model(tmp_path)  # the configuration fits; the weights do not
    assert isinstance(read, Qwen2ForCausalLM)
    torch.testing.assert_close(read(ids).logits, plain(ids).logits)
    said = capsys.readouterr().err
    assert "seems to be a boosted model" in said and "lacks" in said
    rewrite(tmp_path, num_submodels=None, ensemble_config={"fusion_lambda": 0.5})
    assert isinstance(load_model_config(tmp_path), Qwen2Config)
    assert "sub_model_cfgs" in capsys.readouterr().err
    fused(model(), model()).save_pretrained(tmp_path / "boosted")
    rewrite(tmp_path / "boosted", num_sub_models=3)
    with pytest.raises(UserError, match="num_sub_models: 3, with 2"):
        load_model(tmp_path / "boosted")


def test_scores_are_those_of_the_mixed_distribution(chats, tmp_path):
    from ds_llm.pretrained.loading import load_tokenizer
    from ds_llm.scoring.forward import Scorer
    from ds_llm.scoring.metrics import Sample

    first, second = load_model(chats / "llama"), load_model(chats / "llama")
    for parameter in second.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    boosted = fused(first, second, fusion_lambda=0.25)
    boosted.save_pretrained(tmp_path)
    load_tokenizer(chats / "llama").save_pretrained(tmp_path)
    ids = [torch.randint(3, 250, (n,)) for n in (12, 30)]
    samples = [Sample(i.numpy(), np.arange(len(i)) % 3 > 0) for i in ids]
    with Scorer(tmp_path, ["entropy", "logprob"]) as scorer:
        rows = scorer.score(samples)
    for i, sample, row in zip(ids, samples, rows, strict=True):
        log_p = boosted(i[None]).logits.detach()[0].double().log_softmax(-1)[torch.from_numpy(sample.targets) - 1]
        assert row["entropy"] == pytest.approx(float(-(log_p.exp() * log_p).sum(-1).mean()), rel=1e-4)
        picked = log_p.gather(-1, i[sample.targets][:, None])
        assert row["logprob"] == pytest.approx(float(picked.mean()), rel=1e-4)


def test_config_of_two_architectures_keeps_both():
    config = QwenBoostConfig.from_dict(fused(model("llama"), model("qwen3")).config.to_dict())
    assert [c["model_type"] for c in config.sub_model_cfgs] == ["llama", "qwen3"]
    assert config.num_hidden_layers == 4 and len(config.layer_types) == 4
