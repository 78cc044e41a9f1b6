"""Answers compared with references: which rows are used, and the same figures in training and after it, on any number
of processes."""

import json

import pytest
from jobs import ROOT, launch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_llm.config import run as config
from ds_llm.config.text_metrics import LABELS
from ds_llm.errors import ConfigError, UserError
from ds_llm.evaluation import generations
from ds_llm.evaluation.generations import measure_generations
from ds_llm.evaluation.references import read_references
from ds_llm.evaluation.text_metrics import compare
from ds_llm.pretrained.loading import load_tokenizer
from ds_llm.tracking import metrics_file as metrics
from ds_llm.train import trainer

SCRIPT = ROOT / "launch" / "evaluate.py"


def lines(path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def said(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


@pytest.fixture
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("DS_LLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def trained(chats, tmp_path_factory):
    """Output folder and records of a run of two processes under ZeRO-3 that learns to answer in the words it is told.

    Its prompts have different lengths, and so have the answers: a process that is done has to wait for the other.
    """
    output = tmp_path_factory.mktemp("trained") / "run"
    overrides = [
        "mode=sft", f"model.path={chats / 'llama'}", f"output={output}", f"data.train={chats / 'train.jsonl'}",
        f"data.val={chats / 'val.jsonl'}", "data.seq_len=96", "train.batch_size=4", "train.dtype=fp32", "zero=3",
        "train.max_steps=24", "optim.lr=2e-2", "eval.batch_size=3", "tracking.tensorboard=false",
        "eval.generation_metrics=[rouge,bleu,chrf]", "eval.generation_rows=10", "eval.max_new_tokens=12",
    ]  # fmt: skip
    done = launch("forked", overrides, DS_LLM_CACHE=str(output.with_name("cache")))
    assert done.returncode == 0, done.stdout + done.stderr
    return output, metrics.read(output / "metrics.jsonl"), done.stdout


def test_figures_of_a_run_are_those_of_its_model(trained, chats, tmp_path):
    output, records, said = trained
    assert "eval.generation_metrics: 10 prompts with references" in said and "ROUGE-L" in said
    evals = [r for r in records if r["kind"] == "eval"]
    assert all(LABELS.keys() <= r.keys() and r["generated"] == 10 for r in evals)
    best = min(evals[1:], key=lambda r: r["perplexity"])
    assert best["rouge1"] > evals[0]["rouge1"] + 5  # it has learned which words there are
    summary = records[-1]
    assert {f"{name}_at_best_step": best[name] for name in LABELS}.items() <= summary.items()
    start = next(r for r in records if r.get("event") == "start")
    assert start["generation_metrics"].keys() == {"bleu", "chrf", "rouge"}
    page = (output / "report.html").read_text()
    assert "Generated answers against the references" in page and page.count("ROUGE-L") >= 2
    # one process, other batches, the model as it was saved
    out = tmp_path / "out.jsonl"
    figures, about = measure_generations(
        str(output), [chats / "val.jsonl"], ["bleu", "chrf", "rouge"], rows=10, max_new_tokens=12, out=str(out)
    )
    assert figures == {name: best[name] for name in LABELS} and about["signatures"] == start["generation_metrics"]
    # and as transformers alone answers, a row at a time
    model, tokenizer = (kind.from_pretrained(output / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    expected = [json.loads(line)["messages"] for line in (chats / "val.jsonl").read_text().splitlines()][:10]
    for row, messages in zip(rows, expected, strict=True):
        ids = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert row["generation"] == tokenizer.decode(made, skip_special_tokens=True)
        assert row["reference"] == messages[-1]["content"] and messages[-2]["content"] in row["prompt"]
    texts, references = ([row[name] for row in rows] for name in ("generation", "reference"))
    assert compare(texts, references, ["bleu", "chrf", "rouge"]) == figures


def test_the_command_gives_the_same_on_two_processes(trained, chats, tmp_path):
    found = {}
    for kind in ("forked", "forked-1"):
        paths = {name: tmp_path / f"{kind}.{name}" for name in ("json", "out")}
        arguments = ["generations", "--model", str(trained[0]), "--data", str(chats / "val.jsonl"), "--metrics", "bleu"]
        arguments += ["rouge", "--max-new-tokens", "12", "--batch-size", "3"]
        arguments += [text for name, path in paths.items() for text in (f"--{name}", str(path))]
        done = launch(kind, arguments, script=SCRIPT)
        assert done.returncode == 0, done.stderr
        found[kind] = json.loads(paths["json"].read_text()), paths["out"].read_text(), done.stdout
    (two, texts, shown), (one, other, _) = found["forked"], found["forked-1"]
    assert texts == other and texts.count("\n") == one["rows"] == 20
    assert two["world_size"] == 2 and {n: two[n] for n in LABELS if n in two} == {n: one[n] for n in LABELS if n in one}
    assert f"ROUGE-1 {one['rouge1']:.2f}" in shown and "chrF" not in shown and one["rouge1"] > 0


def test_token_files_are_trained_on_and_other_rows_answered(tiny, tmp_path):
    """A model without a chat template continues prompts as they are."""
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(9)]
    data = lines(tmp_path / "rows.jsonl", *rows)
    overrides = [*tiny, f"output={tmp_path / 'run'}", "zero=0", "train.max_steps=2", "eval.max_new_tokens=4"]
    overrides += ["eval.generation_metrics=rouge", f"eval.generation_data={data}", "ema.enabled=true"]
    assert trainer.train(config.load(None, overrides)) == 0
    records = metrics.read(tmp_path / "run" / "metrics.jsonl")
    found = [r for r in records if r["kind"] == "eval"]
    figures, _ = measure_generations(str(tmp_path / "run"), [data], ["rouge"], max_new_tokens=4)
    assert figures.items() <= found[-1].items() and found[-1]["generated"] == 9
    tokenizer = load_tokenizer(tmp_path / "run" / "model")
    read = read_references([data], tokenizer, max_new_tokens=4, positions=32)
    assert read.ids == [tokenizer(row["prompt"])["input_ids"] for row in rows] and read.answers[3] == " w5 w6"
    with pytest.raises(UserError, match="has no chat template"):
        chat = lines(tmp_path / "chat.jsonl", {"messages": [said("user", "a"), said("assistant", "b")]})
        read_references([chat], tokenizer, max_new_tokens=4, positions=32)


def test_which_rows_are_used(chats, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(chats / "llama")
    question, answer = said("user", "red"), said("assistant", "blue")
    call = said("assistant", "", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])
    good = [
        {"messages": [said("system", "s"), question, answer, said("user", "cat"), said("assistant", "dog sun")]},
        {"messages": [question, answer, said("user", "nobody answers")]},
        {"conversations": [{"from": "human", "value": "sun"}, {"from": "gpt", "value": "moon"}]},
    ]
    bad = [
        "{broken",
        {"messages": [question]},
        {"messages": [answer]},
        {"messages": [question, call]},
        {"messages": [said("user", "red " * 200), answer]},
    ]
    mixed = lines(tmp_path / "chats.jsonl", good[0], *bad, *good[1:])
    found = read_references([mixed], tokenizer, max_new_tokens=2, positions=128)
    prompts = [good[0]["messages"][:-1], good[1]["messages"][:1], [said("user", "sun")]]
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    assert found.prompts == texts and found.answers == ["dog sun", "blue", "moon"]
    assert found.ids == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    why = ["bad JSON", *["no answer in words"] * 3, "too long"]
    assert [(row, reason.split(" (")[0]) for _, row, reason in found.rejected] == list(enumerate(why, 2))
    lengths = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in found.answers]
    assert found.longer == sum(length > 2 for length in lengths)
    assert f"3 no answer in words ({mixed}:3, {mixed}:4, {mixed}:5)" in found.describe()
    assert len(read_references([mixed, mixed], tokenizer, max_new_tokens=2, positions=None, rows=4)) == 4
    for row, expected in (
        ({"prompt": "red", "completion": "blue"}, "blue"),
        ({"prompt": [question], "completion": [answer]}, "blue"),
        ({"instruction": "red", "output": "blue"}, "blue"),
        ({"prompt": [question], "chosen": [answer], "rejected": [said("assistant", "no")]}, "blue"),
    ):
        found = read_references([lines(tmp_path / "row.jsonl", row)], tokenizer, max_new_tokens=2, positions=128)
        assert (found.prompts, found.answers) == (
            [tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)],
            [expected],
        )


def test_what_gives_no_figures_is_one_line(chats, corpus, tiny, cache, tmp_path):
    text = lines(tmp_path / "text.jsonl", {"text": "only a text"})
    chinese = lines(tmp_path / "chinese.jsonl", {"prompt": "red", "completion": "天地玄黄"})
    sft = ["mode=sft", f"model.path={chats / 'llama'}", f"data.train={chats / 'train.jsonl'}", "data.seq_len=96"]
    sft += [f"data.val={chats / 'val.jsonl'}", "eval.generation_metrics=[rouge]"]
    for overrides, says in (
        ([*tiny, "eval.generation_metrics=[bleu]"], "val.bin: a token file has no prompts and references"),
        ([*tiny, "eval.generation_metrics=[meteor]"], "eval.generation_metrics: 'meteor' is not one of bleu, chrf"),
        ([*tiny, "eval.generation_metrics=[bleu]", "data.val=[]"], "eval.generation_metrics: needs data.val"),
        ([*tiny, f"eval.generation_data={text}"], "eval.generation_data: is for eval.generation_metrics"),
        ([*sft, f"eval.generation_data={text}"], "text.jsonl: rows of text have no prompts and references"),
        ([*sft, f"eval.generation_data={chinese}"], "eval.generation_tokenizer: 1 of 1 references have none of the"),
        ([*sft, "eval.max_new_tokens=127"], "no usable prompt with a reference: 20 too long"),
    ):
        with pytest.raises((ConfigError, UserError)) as raised:
            settings = config.load(None, overrides)
            tokenizer = load_tokenizer(settings.model.path or corpus / "tokenizer")
            generations.prepare(settings, tokenizer)
        assert says in str(raised.value) and "\n" not in str(raised.value)
    assert generations.prepare(config.load(None, tiny), None)(None) is None
    with pytest.raises(UserError, match=r"nowhere/out\.jsonl: cannot be written"):
        out = str(tmp_path / "nowhere" / "out.jsonl")
        measure_generations(str(chats / "llama"), [chats / "val.jsonl"], ["bleu"], out=out)
    with pytest.raises(ConfigError, match="max-new-tokens: 0 must be at least 1"):
        measure_generations(str(chats / "llama"), [chats / "val.jsonl"], ["bleu"], max_new_tokens=0)
