"""Fusing and taking out: what is written has the logits it should have, or nothing is written."""

import pytest
import torch
from jobs import ROOT, launch
from transformers import AutoModelForCausalLM

from ds_llm.convert import boost as convert
from ds_llm.errors import UserError
from ds_llm.pretrained.loading import load_model, load_tokenizer


@pytest.fixture
def pair(chats, tmp_path):
    """Two models of one vocabulary, the second with other weights."""
    second = load_model(chats / "llama")
    for parameter in second.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    second.save_pretrained(tmp_path / "second")
    load_tokenizer(chats / "llama").save_pretrained(tmp_path / "second")
    return chats / "llama", tmp_path / "second"


def logits(folder, ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits.double()


def test_commands_fuse_and_take_out(pair, tmp_path):
    ids = torch.randint(3, 250, (2, 20))
    run = lambda *arguments: launch("forked-1", list(map(str, arguments)), script=ROOT / "launch/convert.py")  # noqa: E731
    done = run("boost", "--models", *pair, "--out", tmp_path / "fused", "--lambda", "0.3")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "fused against the vote of 2 models, fp32: largest difference of the logits" in done.stdout
    expected = 0.7 * logits(pair[0], ids) + 0.3 * logits(pair[1], ids)
    torch.testing.assert_close(logits(tmp_path / "fused", ids), expected, rtol=1e-5, atol=1e-5)
    again = run("boost", "--models", *pair, "--out", tmp_path / "fused")
    assert again.returncode != 0 and again.stderr.count("\n") == 1 and "holds something already" in again.stderr
    for index, original in enumerate(pair):
        found = convert.extract(tmp_path / "fused", index, tmp_path / f"part{index}")
        assert found.made < 1e-5
        assert torch.equal(logits(found.folder, ids), logits(original, ids))
        assert load_tokenizer(found.folder).chat_template == load_tokenizer(original).chat_template


def test_mixed_architectures_and_a_mean_of_three(chats, pair, tmp_path):
    ids = torch.randint(3, 250, (2, 20))
    models = [pair[0], chats / "decoder", chats / "qwen3_moe"]
    assert convert.boost(models, tmp_path / "fused").made < 1e-5
    expected = sum(logits(model, ids) for model in models) / 3
    torch.testing.assert_close(logits(tmp_path / "fused", ids), expected, rtol=1e-4, atol=1e-5)
    found = convert.extract(tmp_path / "fused", 1, tmp_path / "part")
    torch.testing.assert_close(logits(found.folder, ids), logits(models[1], ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("connection", ["linear", "gated"])
def test_a_fed_model_is_taken_out_only_on_request(pair, tmp_path, connection):
    ids = torch.randint(3, 250, (2, 20))
    convert.boost(pair, tmp_path / "fused", connection=connection)
    assert (
        convert.extract(tmp_path / "fused", 1, tmp_path / "untrained").made < 1e-5
    )  # its connection has no effect yet
    assert torch.equal(logits(tmp_path / "untrained", ids), logits(pair[1], ids))
    model = load_model(tmp_path / "fused")
    for name, parameter in model.named_parameters():
        if ".prev_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "trained")
    load_tokenizer(pair[0]).save_pretrained(tmp_path / "trained")
    assert torch.equal(logits(tmp_path / "trained", ids), model(ids).logits.detach().double())
    with pytest.raises(UserError, match="is fed by its predecessor"):
        convert.extract(tmp_path / "trained", 1, tmp_path / "taken")
    assert not (tmp_path / "taken").exists()
    found = convert.extract(tmp_path / "trained", 1, tmp_path / "taken", drop_connection=True)
    assert found.made > 1e-3
    assert torch.equal(logits(tmp_path / "taken", ids), logits(pair[1], ids))


def test_what_does_not_fit_is_refused(chats, pair, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="at least two models"):
        convert.boost(pair[:1], out)
    with pytest.raises(UserError, match="lambda 2: must be between 0 and 1"):
        convert.boost(pair, out, fusion_lambda=2)
    with pytest.raises(UserError, match="there is nothing to take out"):
        convert.extract(pair[0], 0, out)
    convert.boost(pair, tmp_path / "fused")
    with pytest.raises(UserError, match="is a boosted model itself"):
        convert.boost([pair[0], tmp_path / "fused"], out)
    with pytest.raises(UserError, match="has the sub-models 0 to 1"):
        convert.extract(tmp_path / "fused", 2, out)
    tokenizer = load_tokenizer(pair[1])
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(pair[1])
    with pytest.raises(UserError, match="have different tokenizers"):
        convert.boost(pair, out)
    load_tokenizer(pair[0]).save_pretrained(pair[1])
    from ds_llm.models.boost import QwenBoostConfig

    monkeypatch.setattr(QwenBoostConfig, "vote", [0.6, 0.4])
    with pytest.raises(UserError, match="the fused model's logits are not the vote"):
        convert.boost(pair, out)
    assert not out.exists()
