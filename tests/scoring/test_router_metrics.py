"""Router features and the gates' quality in whole runs: by rows, against the definition, whatever interrupts."""

import json
import random

import numpy as np
import pytest
import torch
import transformers
from chats import WORDS
from tiny_models import EXPERTS

from ds_llm.convert.select_moe import select_moe
from ds_llm.errors import ConfigError, UserError
from ds_llm.models.quality_gate import gates
from ds_llm.pretrained.loading import load_model, load_tokenizer
from ds_llm.scoring import forward, options, parts, run
from ds_llm.scoring.metrics import Sample


@pytest.fixture
def data(tmp_path) -> str:
    rows = [json.dumps({"text": " ".join(random.choices(WORDS, k=random.randint(1, 12)))}) for _ in range(40)]
    rows[random.randrange(40)] = "{bad"
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def score(model, data, out, **more):
    flags = {"model": str(model), "data": [data], "out": str(out), "tokens_per_batch": 64, "report": False}
    return run.score(options.load(flags={**flags, "metric": ["entropy", "router"], **more}))


def test_arrays_lie_by_rows_in_a_file_whatever_interrupts(chats, data, tmp_path, monkeypatch):
    out = tmp_path / "scores.jsonl"
    score(chats / "qwen3_moe", data, out)
    features = np.load(out.with_name("scores.jsonl.d") / "router.npy", mmap_mode="r")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert features.shape == (40, 2, 4) and features.dtype == np.float16
    model = transformers.AutoModelForCausalLM.from_pretrained(chats / "qwen3_moe").eval()
    tokenizer = load_tokenizer(chats / "qwen3_moe")
    for line, found in zip(lines, features, strict=True):
        assert "router" not in line
        if "text" not in line:
            assert np.isnan(found).all() and line["routing_entropy"] is None
            continue
        with torch.no_grad():
            logits = model(**tokenizer(line["text"], return_tensors="pt"), output_router_logits=True).router_logits
        np.testing.assert_allclose(found, torch.stack(logits).softmax(-1).mean(1), rtol=1e-3)

    broken, real = tmp_path / "broken.jsonl", parts.Part.append
    left = [random.randint(1, 5)]

    def die(part, *arguments):
        real(part, *arguments)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(parts.Part, "append", die)
    with pytest.raises(KeyboardInterrupt):
        score(chats / "qwen3_moe", data, broken)
    monkeypatch.undo()
    score(chats / "qwen3_moe", data, broken)
    for name in ("router.npy", "rows.parquet"):
        there = [(path.with_name(f"{path.name}.d") / name).read_bytes() for path in (out, broken)]
        assert there[0] == there[1]
    with pytest.raises(UserError, match="is finished with another arrays"):
        score(chats / "qwen3_moe", data, out, field=["entropy", "paths"])
    with pytest.raises(ConfigError, match="cannot be the name of a file"):
        score(chats / "qwen3_moe", data, tmp_path / "x.jsonl", field=["entropy", "a/b"])
    score(chats / "qwen3_moe", data, out, overwrite=True, field=["entropy", "paths"])
    assert sorted(path.name for path in out.with_name("scores.jsonl.d").glob("*.npy")) == ["paths.npy"]


@pytest.fixture(scope="module")
def gated(chats, tmp_path_factory):
    """Folders of Select-MoE models whose gates tell tokens apart."""
    folder = tmp_path_factory.mktemp("gated")
    tokenizer = load_tokenizer(chats / "decoder")
    olmoe = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**EXPERTS | {"vocab_size": len(tokenizer)}))
    olmoe.save_pretrained(folder / "original")
    tokenizer.save_pretrained(folder / "original")
    for kind in ("decoder", "qwen3_moe", "olmoe"):
        select_moe(str(folder / "original" if kind == "olmoe" else chats / kind), folder / kind)
        model = load_model(folder / kind, "fp32")
        for gate in gates(model):
            gate.reset_parameters(std=0.5)
        model.save_pretrained(folder / kind)
    return folder


@pytest.mark.parametrize("kind", ["decoder", "qwen3_moe", "olmoe"])
def test_quality_is_the_mean_of_the_gates_over_tokens_then_layers(kind, gated, monkeypatch):
    scorer = forward.Scorer(gated / kind, ["quality", "router"], dtype="fp32", device="cpu")
    rows = [Sample(np.random.default_rng().integers(4, 90, n), np.zeros(n, bool)) for n in (20, 1, 9)]
    model = load_model(gated / kind, "fp32").eval()
    expected = []
    for row in rows:
        seen = []
        hooks = [
            g.register_forward_pre_hook(lambda gate, x, s=seen: s.append(x[0] @ gate.weight.T)) for g in gates(model)
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor(row.input_ids[None]))
        for hook in hooks:
            hook.remove()
        assert len(seen) == 2
        expected.append(np.mean([(1 / (1 + np.exp(-score.double().numpy()))).mean() for score in seen]))
    assert np.ptp(expected) > 1e-3
    for packed in (True, False):  # one row of documents, or rows padded to the longest
        monkeypatch.setattr(scorer, "_packed", packed)
        monkeypatch.setitem(forward.SPLIT_TOKENS, "cpu", 10**6)
        scorer.model.set_attn_implementation("ds_llm_documents" if packed else "sdpa")
        found = scorer.score(rows)
        assert [row["quality"] for row in found] == pytest.approx(expected, rel=1e-5)
        assert all(row["router"].shape == (2, 4) for row in found)


def test_a_model_without_gates_has_no_quality(chats, data, tmp_path):
    with pytest.raises(UserError, match="has no quality gates"):
        score(chats / "decoder", data, tmp_path / "scores.jsonl", metric=["quality"])
