"""Perplexity of models on files: against a few lines of transformers, at every number of processes, and its errors."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from jobs import ROOT, VOCAB, launch

from ds_llm.data import corpora
from ds_llm.data.tokens import TokenFile
from ds_llm.errors import UserError
from ds_llm.evaluation.measure import measure, read_texts
from ds_llm.evaluation.perplexity import model_loss, perplexity_of_tokens
from ds_llm.models.head import attach_loss_head
from ds_llm.pretrained.loading import load_model, load_tokenizer

SCRIPT = ROOT / "launch" / "evaluate.py"


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    """Folder of a Llama with random weights and 48 positions. Its wide MLP is what MKL splits among threads."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=4096,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=48,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(corpus / "tokenizer").save_pretrained(folder)
    return folder


def lines(path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def plain_perplexity(model, ids: torch.Tensor, window: int) -> float:
    """The published protocol, as short as it gets: mean loss per window, exp of the mean.

    In float64 from the logits on: the float32 softmax of transformers' own loss is off by 2e-5 on some CPUs.
    """
    losses = []
    for row in ids[: len(ids) // window * window].view(-1, window):
        with torch.no_grad():
            logits = model(row[None]).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:]).item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.smollm2
def test_smollm2_equals_a_few_lines_of_transformers(tmp_path):
    """Random scenes of a play, one of them empty, windows without and with overlap."""
    folder = corpora.smollm2()["smollm2"]
    rows = corpora.shakespeare(tmp_path / "corpus")["val"].read_text().splitlines()
    start = np.random.default_rng().integers(0, len(rows) - 4)
    texts = [json.loads(row)["text"] for row in rows[start : start + 4]]
    texts.insert(2, "")
    data = lines(tmp_path / "plays.jsonl", *({"text": text} for text in texts))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer("\n\n".join(texts), return_tensors="pt")["input_ids"][0]

    found, about = measure(str(folder), [data], window=96, max_windows=4, batch_size=2)
    assert about["documents"] == 5 and found.stream_tokens == len(ids) and found.windows == 4
    # sums of float32 in two orders: numbers of up to 30 are rounded by 2^-24 x 30 in each of 30 layers, as if at random
    assert math.isclose(found.value, plain_perplexity(reference, ids[: 4 * 96], 96), rel_tol=1e-5)
    assert 2 < found.value < 500  # a pretrained model, not noise: its vocabulary has 49,152 tokens

    total, count = 0.0, 0
    for first in range(0, 3 * 64, 64):
        with torch.no_grad():
            logp = reference(ids[None, first : first + 96]).logits[0].double().log_softmax(-1)
        for target in range(1 if first == 0 else 32, 96):  # later windows repeat 32 tokens of the one before
            total, count = total - logp[target - 1, ids[first + target]].item(), count + 1
    loss = model_loss(attach_loss_head(reference), "cpu")
    found = perplexity_of_tokens(loss, ids, token_length=96, stride=64, max_windows=3)
    assert found.tokens == count == 95 + 2 * 64
    assert math.isclose(found.value, math.exp(total / count), rel_tol=1e-5)


def test_one_and_two_processes_give_the_same_bits(corpus, model, tmp_path):
    """Also with different numbers of threads, and both print the same line."""
    arguments = ["perplexity", "--model", str(model), "--data", str(corpus / "val.bin"), "--window", "32"]
    results, output = [], []
    for launcher, threads in (("python", "2"), ("forked", "1")):
        path = tmp_path / f"{launcher}.json"
        done = launch(launcher, [*arguments, "--json", str(path)], script=SCRIPT, OMP_NUM_THREADS=threads)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(path.read_text()))
        output.append([line for line in done.stdout.splitlines() if line.startswith("perplexity ")])
    one, two = results
    assert (one["world_size"], two["world_size"]) == (1, 2)
    for name in ("nll", "value", "windows", "tokens", "dropped_tokens"):
        assert one[name] == two[name]
    assert [len(out) for out in output] == [1, 1] and f"perplexity {one['value']:.4f} " in output[1][0]
    ids = torch.from_numpy(TokenFile(corpus / "val.bin").tokens.astype(np.int64))
    assert one["windows"] == len(ids) // 32 and one["data_kind"] == "tokens"
    assert math.isclose(one["value"], plain_perplexity(load_model(model), ids, 32), rel_tol=1e-5)
    assert one["environment"]["versions"]["torch"] == torch.__version__


def test_window_is_the_models_context_where_that_is_shorter(corpus, model):
    found, about = measure(str(model), [str(corpus / "val.bin")])
    assert (found.token_length, found.stride, about["dtype"]) == (48, 48, "float32")


def test_rows_without_text_are_reported_and_empty_texts_stay(model, tmp_path, capsys):
    words = [" ".join(f"w{i}" for i in np.random.default_rng().integers(0, 50, 30)) for _ in range(3)]
    path = lines(
        tmp_path / "rows.jsonl", {"t": words[0]}, {"t": ""}, "{broken", {"t": words[1]}, {"x": 1}, {"t": " "}, {"t": 3}
    )
    more = tmp_path / "more.txt"
    more.write_text(words[2])
    texts, rejected = read_texts([path, more], "t")
    assert texts == [words[0], "", words[1], " ", words[2]]
    assert [(row, reason.split(" (")[0]) for _, row, reason in rejected] == [
        (3, "bad JSON"),
        (5, "missing field"),
        (7, "wrong type"),
    ]
    _, about = measure(str(model), [path, str(more)], window=16, text_field="t")
    assert about["documents"] == 5 and [entry["row"] for entry in about["rejected"]] == [3, 5, 7]
    assert "3 rows left out: 1 bad JSON (rows.jsonl:3)" in capsys.readouterr().out


def test_mistakes_are_named(corpus, model, tmp_path):
    text, empty = tmp_path / "text.txt", tmp_path / "empty.jsonl"
    text.write_text("w1 w2 w3 w4")
    lines(empty, {"text": ""}, {"other": "w1"})
    other = tmp_path / "other"
    tokenizer = load_tokenizer(corpus / "tokenizer")
    tokenizer.add_tokens(["w_new"])
    tokenizer.save_pretrained(other)
    tokens = str(corpus / "val.bin")
    for data, arguments, message in (
        ([tokens], {"window": 49}, "window 49: longer than the 48 positions"),
        ([str(tmp_path / "none.txt")], {}, "no such file"),
        ([str(tmp_path / "none.bin")], {}, "no such token file"),
        ([str(empty)], {}, r"no text to evaluate on: 1 missing field \(empty.jsonl:2\)"),
        ([str(text)], {"window": 16}, "4 tokens, less than one window of 16"),
        ([str(text), tokens], {}, "cannot be evaluated together"),
        ([tokens], {"tokenizer_path": str(other)}, "made with another tokenizer"),
        ([str(text)], {"window": 4, "tokenizer_path": str(other)}, f"{VOCAB + 1} tokens, the model only {VOCAB}"),
        ([tokens], {"window": 16, "stride": 17}, "stride 17: must be between 1"),
        ([tokens], {"window": 0}, "token length 0"),
        ([tokens], {"window": 16, "max_windows": -1}, "max windows -1"),
        ([tokens], {"window": 16, "text_field": "body"}, "token files have no fields"),
    ):
        with pytest.raises(UserError, match=message):
            measure(str(model), data, **arguments)


def test_a_mistake_is_one_line_on_the_command_line(corpus, tmp_path):
    missing = str(tmp_path / "missing")
    done = launch("forked-1", ["perplexity", "--model", missing, "--data", str(corpus / "val.bin")], script=SCRIPT)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {missing}: no such file or folder") and done.stderr.count("\n") == 1
