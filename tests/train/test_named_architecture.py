"""Pretraining from scratch of an architecture of transformers that `model.config` names."""

import json

import pytest
import torch
from jobs import TRACKED, VOCAB, launch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3NextConfig

from ds_llm.config import run as config
from ds_llm.errors import ConfigError, UserError
from ds_llm.pretrained.architecture import architecture
from ds_llm.pretrained.loading import load_tokenizer
from ds_llm.tracking import metrics_file as metrics
from ds_llm.train import trainer


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A JSON file of a small hybrid with experts, and nothing beside it."""
    path = tmp_path_factory.mktemp("named") / "hybrid.json"
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 16, "vocab_size": 997}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    experts |= {"shared_expert_intermediate_size": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    Qwen3NextConfig(**size, **heads, **experts, max_position_embeddings=64).to_json_file(path)
    return path


def arguments(corpus, named) -> list[str]:
    return [
        f"data.train={corpus / 'train.bin'}",
        f"data.val={corpus / 'val.bin'}",
        f"model.config={named}",
        "data.seq_len=32",
        "train.dtype=fp32",
        "train.max_steps=3",
        "optim.lr=1e-3",
        *TRACKED,
    ]


def losses(output) -> list[float]:
    return [r["loss"] for r in metrics.read(output / "metrics.jsonl") if r["kind"] == "step"]


def test_it_trains_alike_on_one_process_and_sharded_on_two_and_loads(corpus, named, tmp_path, capfd):
    options = arguments(corpus, named)
    assert (
        trainer.train(config.load(None, [*options, "zero=0", "train.batch_size=4", f"output={tmp_path / 'one'}"])) == 0
    )
    out = capfd.readouterr().out
    assert "packed documents: attention document by document, Qwen3NextGatedDeltaNet document by document" in out
    done = launch("forked", [*options, "zero=3", "train.batch_size=2", f"output={tmp_path / 'two'}"])
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 3 and one == pytest.approx(two, rel=1e-4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model", dtype=torch.float32)
    tokenizer = load_tokenizer(corpus / "tokenizer")
    assert model.config.model_type == "qwen3_next" and model.config.vocab_size == VOCAB
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "model", dtype=torch.float32)
    ids = torch.randint(4, VOCAB, (1, 9))
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-2, atol=1e-3)


def test_another_file_of_the_same_name_does_not_continue_a_run(corpus, named, tmp_path):
    path = tmp_path / "architecture.json"
    path.write_text(named.read_text())
    options = [*arguments(corpus, path), "zero=0", "train.batch_size=4", f"output={tmp_path / 'run'}", "data.val=[]"]
    assert trainer.train(config.load(None, options)) == 0
    path.write_text(json.dumps(json.loads(named.read_text()) | {"rms_norm_eps": 1e-3}))
    with pytest.raises(UserError, match="architecture"):
        trainer.train(config.load(None, [*options, "train.max_steps=5"]))


def test_the_plan_counts_its_weights(corpus, named):
    from ds_llm.memory.model import outline

    options = config.load(None, arguments(corpus, named))
    tokenizer = load_tokenizer(corpus / "tokenizer")
    expected = AutoModelForCausalLM.from_config(architecture(options, tokenizer))
    assert outline(options).parameters == sum(p.numel() for p in expected.parameters())
    assert AutoConfig.from_pretrained(named).vocab_size == 997  # not the tokenizer's


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["model.dim=64"], "model.dim: is for the decoder"),
        (["model.path=somewhere"], "model.config: is for training from scratch"),
        (["mode=sft"], "model.config: is for pretrain"),
    ],
)
def test_what_it_does_not_go_with_is_refused(corpus, named, extra, message):
    with pytest.raises(ConfigError, match=message):
        config.load(None, [*arguments(corpus, named), *extra])


def test_what_is_no_architecture_is_refused(corpus, tmp_path):
    broken, encoder = tmp_path / "broken.json", tmp_path / "encoder.json"
    broken.write_text("{")
    encoder.write_text(json.dumps({"model_type": "t5"}))
    for path, message in ((broken, "model.config: .*broken.json"), (encoder, "not a causal language model")):
        with pytest.raises(UserError, match=message):
            trainer.train(config.load(None, [*arguments(corpus, path), f"output={tmp_path / 'run'}"]))
    with pytest.raises(UserError, match=r"data\.seq_len: 32 tokens are more than the model's 16"):
        short = tmp_path / "short.json"
        short.write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 16}))
        trainer.train(config.load(None, [*arguments(corpus, short), f"output={tmp_path / 'run'}"]))
