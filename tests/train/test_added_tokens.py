"""A run that adds tokens and names a template: where the new rows start, what is trained, and what is exported."""

import pytest
import torch
from jobs import TRACKED, launch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from ds_llm.config import run as config
from ds_llm.convert.export import export
from ds_llm.errors import ConfigError, UserError
from ds_llm.generation.generator import Generator
from ds_llm.pretrained.loading import load_model
from ds_llm.train import trainer
from ds_llm.train.start_model import start_model
from ds_llm.train.start_tokenizer import start_tokenizer

TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture
def arguments(chats, monkeypatch, tmp_path_factory) -> list[str]:
    monkeypatch.setenv("DS_LLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    return [
        *("mode=sft", f"data.train={chats / 'train.jsonl'}", "data.seq_len=96", "train.batch_size=2", "optim.lr=1e-2"),
        *("train.dtype=fp32", "train.max_steps=3", "eval.before=false", "data.chat_template=llama3", *TRACKED),
        f"model.add_tokens=[{','.join(TOKENS)}]",
    ]


def test_rows_start_as_the_mean_are_trained_and_exported(chats, arguments, tmp_path):
    arguments.append(f"model.path={chats / 'llama'}")
    before = AutoModelForCausalLM.from_pretrained(chats / "llama")
    settings = config.load(None, arguments)
    tokenizer = start_tokenizer(settings)
    old, ids = len(tokenizer) - 3, tokenizer.convert_tokens_to_ids(TOKENS)
    assert ids == [old, old + 1, old + 2]
    start = start_model(settings, tokenizer)
    for kept, made in ((before.model.embed_tokens, start.model.embed_tokens), (before.lm_head, start.lm_head)):
        assert torch.equal(made.weight[:old], kept.weight[:old])
        for row in made.weight[old : old + 3]:
            torch.testing.assert_close(row, kept.weight[:old].mean(0))

    assert trainer.train(config.load(None, [*arguments, f"output={tmp_path / 'one'}", "zero=0"])) == 0
    done = launch("forked", [*arguments, f"output={tmp_path / 'two'}", "zero=3", "train.batch_size=1"])
    assert done.returncode == 0, done.stdout + done.stderr
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("one", "two")]
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=2e-3, rtol=0)
    moved = models[0].model.embed_tokens.weight[ids] - start.model.embed_tokens.weight[ids]
    assert (moved.abs().max(1).values > 1e-3).all()

    saved = AutoTokenizer.from_pretrained(tmp_path / "one" / "model")
    assert saved.convert_tokens_to_ids(TOKENS) == ids and "<|eot_id|>" in saved.chat_template
    for folder in (tmp_path / "one" / "model", export(tmp_path / "one", tmp_path / "out").folder):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [saved.eos_token_id, ids[2]]
    assert ids[2] in Generator(str(tmp_path / "one"))._ends


def test_rows_that_pad_the_embedding_are_used_first(chats, arguments, tmp_path):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(chats / "llama"),
        AutoTokenizer.from_pretrained(chats / "llama"),
    )
    rows = len(tokenizer) + 8
    model.resize_token_embeddings(rows)
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    settings = config.load(None, [*arguments, f"model.path={tmp_path / 'padded'}"])
    start = start_model(settings, start_tokenizer(settings))
    weight = start.get_input_embeddings().weight
    assert len(weight) == rows == start.config.vocab_size
    torch.testing.assert_close(weight[len(tokenizer)], model.get_input_embeddings().weight[: len(tokenizer)].mean(0))


def test_a_token_that_is_there_already_keeps_its_row(chats, arguments, capsys):
    settings = config.load(None, [*arguments, f"model.path={chats / 'llama'}"])
    settings.model.add_tokens = ["<|im_end|>", *TOKENS]
    tokenizer = start_tokenizer(settings)
    assert "<|im_end|>: in the tokenizer already" in capsys.readouterr().out
    kept = AutoModelForCausalLM.from_pretrained(chats / "llama").get_input_embeddings().weight
    number = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert torch.equal(start_model(settings, tokenizer).get_input_embeddings().weight[number], kept[number])


@pytest.mark.parametrize(
    "keys, error, text",
    [
        (["model.add_tokens=[a,a]"], ConfigError, "^model.add_tokens: a is named twice$"),
        (["model.add_tokens=['']"], ConfigError, "^model.add_tokens: a token is empty$"),
        (["model.add_tokens=[]"], UserError, r"^data.chat_template: llama3 writes .* model.add_tokens="),
    ],
)
def test_what_cannot_be_is_one_line(chats, arguments, keys, error, text):
    with pytest.raises(error, match=text):
        start_tokenizer(config.load(None, [*arguments, f"model.path={chats / 'llama'}", *keys]))


def test_token_files_have_neither(tiny):
    for key in ("data.chat_template=chatml", "model.add_tokens=[a]"):
        with pytest.raises(ConfigError, match="is for conversations; token files are made with their tokenizer"):
            trainer.train(config.load(None, [*tiny, "zero=0", key]))


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_train_and_save_the_embeddings(chats, arguments, tmp_path, tied):
    config_ = LlamaConfig(**LlamaConfig.from_pretrained(chats / "llama").to_dict() | {"tie_word_embeddings": tied})
    torch.manual_seed(0)
    LlamaForCausalLM(config_).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(chats / "llama").save_pretrained(tmp_path / "base")
    keys = [*arguments, f"model.path={tmp_path / 'base'}", "lora.enabled=true", "lora.r=4"]
    assert trainer.train(config.load(None, [*keys, f"output={tmp_path / 'one'}", "zero=0"])) == 0
    done = launch("forked", [*keys, f"output={tmp_path / 'two'}", "zero=3", "train.batch_size=1"])
    assert done.returncode == 0, done.stdout + done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one" / "model")
    ids = tokenizer.convert_tokens_to_ids(TOKENS)
    merged = load_model(tmp_path / "one", "fp32")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "base").get_input_embeddings().weight
    mean = start[: ids[0]].mean(0)
    for row in merged.get_input_embeddings().weight[ids]:
        assert (row - mean).abs().max() > 1e-3  # trained
    shared = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert shared == tied
    exported = AutoModelForCausalLM.from_pretrained(export(tmp_path / "one", tmp_path / "out").folder)
    other = load_model(tmp_path / "two", "fp32")
    prompt = torch.tensor([[*ids, 5, 6, 7]])
    with torch.no_grad():
        logits = [model(prompt).logits for model in (merged, exported, other)]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[2], logits[0], atol=2e-2, rtol=1e-2)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # as peft's users load it
    theirs.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "one" / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(prompt).logits, logits[0], atol=1e-4, rtol=1e-4)
