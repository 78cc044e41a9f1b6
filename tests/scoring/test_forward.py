"""The scorer: scores from the definition, samples that do not see each other, routing, wrapped models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from jobs import launch
from tiny_models import VOCAB, build, expected, samples, save

from ds_llm.errors import UserError
from ds_llm.scoring import forward
from ds_llm.scoring.forward import Scorer
from ds_llm.scoring.metrics import Sample

LENGTHS = [17, 2, 24, 1, 9, 24, 11]
RANDOM = np.random.default_rng()


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("scored") / "llama", corpus / "tokenizer")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_scores_are_those_of_the_definition_in_float64(kind, corpus, tmp_path):
    folder = save(kind, tmp_path / kind, corpus / "tokenizer")
    scorer = Scorer(folder, ["entropy", "logprob", "perplexity", "ifd"], dtype="fp32", device="cpu", per_token=True)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    rows = samples(RANDOM, LENGTHS)
    found = scorer.score(rows)
    assert scorer.max_length == 64 and not scorer.collective
    for row, out in zip(rows, found, strict=True):
        assert list(out) == list(scorer.columns)
        entropy, logprob = expected(reference, row)
        assert out["tokens"] == len(entropy) and out["positions"] == row.targets.tolist()
        np.testing.assert_allclose(out["entropy_per_token"], entropy, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(out["logprob_per_token"], logprob, rtol=1e-4, atol=1e-5)
        if not len(entropy):
            assert out["entropy"] == 0 and out["perplexity"] is None and out["ifd"] is None
            continue
        answer = np.concatenate([[scorer.tokenizer.bos_token_id], row.input_ids[row.targets]])
        _, alone = expected(reference, Sample(answer, np.ones(len(answer), bool)))
        assert out["entropy"] == pytest.approx(entropy.mean(), rel=1e-5)
        assert out["logprob"] == pytest.approx(logprob.mean(), rel=1e-5)
        assert out["perplexity"] == pytest.approx(np.exp(-logprob.mean()), rel=1e-4)
        assert out["ifd"] == pytest.approx(logprob.mean() / alone.mean(), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "decoder", "olmoe", "qwen3_moe"])
def test_samples_of_a_batch_do_not_see_each_other(kind, corpus, tmp_path, monkeypatch):
    metrics = ["entropy", "logprob"] if kind == "llama" else ["entropy", "logprob", "router"]
    scorer = Scorer(save(kind, tmp_path / kind, corpus / "tokenizer"), metrics, dtype="fp32", device="cpu")
    rows = samples(RANDOM, LENGTHS)
    alone = [scorer.score([row])[0] for row in rows]
    ways = [(True, "ds_llm_documents", 1), (True, "sdpa", 1), (False, "sdpa", 1), (False, "sdpa", 10**6)]
    for packed, attention, split in ways:
        # one row of documents, as flash attention gets it too, or rows padded at their end, split or together
        monkeypatch.setattr(scorer, "_packed", packed)
        monkeypatch.setitem(forward.SPLIT_TOKENS, "cpu", split)
        scorer.model.set_attn_implementation(attention)
        for one, out in zip(alone, scorer.score(rows), strict=True):
            for name in scorer.columns:
                if one[name] is None:
                    assert out[name] is None
                else:
                    tolerance = 1e-3 if name == "router" else 1e-5  # half precision
                    np.testing.assert_allclose(out[name], one[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["decoder", "olmoe", "qwen3_moe"])
def test_routing_is_the_mean_of_the_gates_over_tokens(kind, corpus, tmp_path):
    folder = save(kind, tmp_path / kind, corpus / "tokenizer")
    scorer = Scorer(folder, ["router"], dtype="fp32", device="cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    rows = samples(RANDOM, [12, 3, 7])
    for row, out in zip(rows, scorer.score(rows), strict=True):
        seen = []
        hooks = [gate.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0])) for gate in gates]
        with torch.no_grad():
            model(input_ids=torch.tensor(row.input_ids[None]))
        for hook in hooks:
            hook.remove()
        inputs = torch.stack([x.reshape(-1, 32) for x in seen]).double()
        logits = inputs @ torch.stack([gate.weight.detach() for gate in gates]).double().mT
        shares = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True) if kind == "decoder" else logits.softmax(-1)
        assert out["router"].dtype == np.float16 and scorer.columns["router"].shape == list(out["router"].shape)
        np.testing.assert_allclose(out["router"], shares.mean(1), rtol=1e-3)
        assert out["routing_entropy"] == pytest.approx(float(-(shares * shares.log()).sum(-1).mean()), rel=1e-4)


def test_sharded_and_split_models_score_as_one_process_does(corpus, tmp_path):
    save("wide", tmp_path / "model", corpus / "tokenizer")
    rows = samples(RANDOM, LENGTHS)
    data = [(row.input_ids.tolist(), row.scored.tolist()) for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps(data))
    whole = Scorer(tmp_path / "model", ["entropy", "ifd"], dtype="fp32", device="cpu")
    expected_rows = whole.score(rows)
    size = sum(p.numel() for p in whole.model.parameters())
    done = launch("forked", [str(tmp_path)], script=Path(__file__).with_name("scorer_worker.py"))
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    for way in ("zero3", "offload", "tensor_parallel"):
        assert all(found[way]["held"] < 0.6 * size for found in ranks)
        assert all(found[way]["fingerprint"] == whole.fingerprint for found in ranks)
        scores = [row for found in ranks for row in found[way]["scores"]]
        for one, out in zip(expected_rows, scores, strict=True):
            assert all(out[name] == (v if v is None else pytest.approx(v, rel=1e-5)) for name, v in one.items())


def test_what_cannot_be_scored_is_said(folder, corpus, tmp_path):
    with pytest.raises(UserError, match="no experts"):
        Scorer(folder, ["router"], device="cpu")
    for options, reason in (
        ({"offload": True}, "set zero3"),
        ({"tensor_parallel": 2}, "must divide the number of processes, 1"),
        ({"tensor_parallel": 2, "zero3": True}, "not together"),
    ):
        with pytest.raises(UserError, match=reason):
            Scorer(folder, ["entropy"], device="cpu", **options)
    scorer = Scorer(folder, ["entropy", "logprob"], dtype="fp32", device="cpu")
    with pytest.raises(ValueError, match="not within the model's 61 tokens"):
        scorer.score([Sample(np.array([1, VOCAB]), np.ones(2, bool))])
    torch.nn.init.constant_(scorer.model.get_output_embeddings().weight, torch.inf)
    fine, broken = scorer.score([Sample(np.array([1]), np.ones(1, bool)), Sample(np.array([1, 4]), np.ones(2, bool))])
    assert "error" not in fine
    assert broken["logprob"] is None and "not finite" in broken["error"]


def test_fingerprint_changes_with_weights_and_configuration_only(corpus, tmp_path):
    model = build("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(corpus / "tokenizer")
    prints = []
    for change in (None, None, "weight", "configuration"):
        if change == "weight":
            with torch.no_grad():
                model.lm_head.weight[3, 5] += 1e-3
        if change == "configuration":
            model.config.rms_norm_eps = 1e-4
        model.save_pretrained(tmp_path / f"m{len(prints)}")
        tokenizer.save_pretrained(tmp_path / f"m{len(prints)}")
        prints.append(Scorer(tmp_path / f"m{len(prints)}", ["entropy"], device="cpu").fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 3
