"""lm-eval on our models: log-likelihoods against float64, figures against numpy, at 1 and 2 processes."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import transformers
import yaml
from jobs import PATIENCE, ROOT, VOCAB, launch, start

from ds_llm.convert.select_moe import select_moe
from ds_llm.errors import UserError
from ds_llm.evaluation.measure import measure
from ds_llm.models.boost import QwenBoostForCausalLM
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM
from ds_llm.pretrained.loading import load_model, load_tokenizer
from ds_llm.scoring.forward import Scorer
from ds_llm.scoring.metrics import Sample

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")

from lm_eval.api.instance import Instance

from ds_llm.evaluation.harness import harness, load_tasks
from ds_llm.evaluation.harness_model import HarnessModel

SCRIPT = ROOT / "launch" / "evaluate.py"
POSITIONS = 48
RANDOM = np.random.default_rng()
SIZE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": POSITIONS}
SIZE |= {"initializer_range": 0.4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama() -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE))


def build(kind: str) -> torch.nn.Module:
    if kind == "decoder":
        return DecoderForCausalLM(DecoderConfig(**SIZE, use_moe=True, n_routed_experts=4))
    return QwenBoostForCausalLM.from_sub_models([llama(), llama()]) if kind == "boosted" else llama()


@pytest.fixture(scope="module")
def models(corpus, tmp_path_factory):
    """Folders of random models: llama, decoder (ours, with experts), the same with gates, boosted, an adapter."""
    import peft

    root = tmp_path_factory.mktemp("models")
    for kind in ("llama", "decoder", "boosted"):
        build(kind).save_pretrained(root / kind)
        load_tokenizer(corpus / "tokenizer").save_pretrained(root / kind)
    select_moe(root / "decoder", root / "gates", init_std=1.0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(load_model(root / "llama"), settings).save_pretrained(root / "adapter")
    path = root / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(root / "llama")}))
    return root


def words(count: int) -> str:
    return " ".join(f"w{i}" for i in RANDOM.integers(0, VOCAB - 4, count))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Folder of task files on 30 random rows: choices of one word, of several, whole texts, and generation."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": words(RANDOM.integers(3, 20)),
            "letters": ["w1", "w2", "w3"],
            "choices": [words(n) for n in (1, 3, 6)],
            "answer": int(RANDOM.integers(3)),
            "text": words(RANDOM.integers(2, 3 * POSITIONS)),
            "target": words(2),
        }
        for _ in range(30)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name: str, **content) -> None:
        content = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, **content}
        content |= {"task": name, "test_split": "test", "fewshot_split": "test", "metadata": {"version": 1}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))

    choice = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "answer"}
    choice["metric_list"] = [{"metric": name} for name in ("acc", "acc_norm")]
    write("tiny_letters", **choice, doc_to_choice="{{letters}}")
    write("tiny_choices", **choice, doc_to_choice="{{choices}}")
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    write("tiny_text", **rolling, metric_list=[{"metric": "word_perplexity"}])
    until = {"until": ["w5"], "max_gen_toks": 6, "do_sample": False}
    written = {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{target}}"}
    write("tiny_written", **written, generation_kwargs=until, metric_list=[{"metric": "bleu"}])
    (folder / "tiny_group.yaml").write_text(
        yaml.safe_dump(
            {
                "group": "tiny_group",
                "task": ["tiny_letters", "tiny_choices"],
                "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
                "metadata": {"version": 1},
            }
        )
    )
    return folder, rows


def expected(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-probability and greediness of a continuation, in the model's own dtype, from its plain logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + continuation[:-1]])).logits[0, -len(continuation) :]
    tokens = torch.tensor(continuation)
    return logits.log_softmax(-1).gather(1, tokens[:, None]).sum().item(), bool((logits.argmax(-1) == tokens).all())


@pytest.mark.parametrize("kind", ["llama", "decoder", "gates", "boosted", "adapter"])
def test_log_likelihoods_are_those_of_the_definition_and_of_the_scoring_engine(models, kind):
    model, tokenizer = load_model(models / kind, "fp32"), load_tokenizer(models / kind)
    exact = copy.deepcopy(model).double().eval()
    lm = HarnessModel(model, tokenizer, batch_size=3)
    requests = []
    for length, count in ((1, 1), (5, 2), (9, 4), (POSITIONS - 2, 2), (4, 3), (17, 1)):
        context = RANDOM.integers(4, VOCAB, length).tolist()
        requests += [(("", ""), context, RANDOM.integers(4, VOCAB, count).tolist()) for _ in range(2)]
        with torch.no_grad():
            best = exact(input_ids=torch.tensor([context])).logits[0, -1].argmax().item()
        requests.append((("", ""), context, [best]))  # greedy, and of the same row as others of one token
    found = lm._loglikelihood_tokens(requests)
    for (value, greedy), (_, context, continuation) in zip(found, requests, strict=True):
        reference, is_greedy = expected(exact, context, continuation)
        assert math.isclose(value, reference, rel_tol=1e-5, abs_tol=1e-5) and greedy == is_greedy
    assert lm.truncated == 0
    with Scorer(models / kind, ["logprob"], dtype="fp32") as scorer:
        samples = []
        for _, context, continuation in requests:
            scored = np.arange(len(context) + len(continuation)) >= len(context)
            samples.append(Sample(np.array(context + continuation), scored))
        scores = [row["logprob"] * row["tokens"] for row in scorer.score(samples)]
    assert np.allclose([value for value, _ in found], scores, rtol=1e-5)

    long = RANDOM.integers(4, VOCAB, POSITIONS + 9).tolist()
    (value, _), _ = lm._loglikelihood_tokens([(("", ""), long, [7, 8]), (("", ""), long[:4], [7])])
    assert lm.truncated == 1
    cut, _ = expected(exact, long[-(POSITIONS - 1) :], [7, 8])
    assert math.isclose(value, cut, rel_tol=1e-5)


def test_a_text_has_the_log_likelihood_that_the_perplexity_protocol_gives(models, tmp_path):
    text = words(POSITIONS)
    (tmp_path / "text.txt").write_text(text)
    found, _ = measure(str(models / "llama"), [tmp_path / "text.txt"])
    tokenizer = load_tokenizer(models / "llama")
    ids = tokenizer(text)["input_ids"]
    lm = HarnessModel(load_model(models / "llama", "fp32"), tokenizer, batch_size=2)
    ((value, _),) = lm._loglikelihood_tokens([(None, ids[:1], ids[1:])])
    assert found.tokens == POSITIONS - 1 and math.isclose(-value / found.tokens, found.nll, rel_tol=1e-6)

    whole = words(2 * POSITIONS + 5)  # windows that meet: each token is predicted once, the first behind <bos>
    ids = tokenizer(whole)["input_ids"]
    exact, total = load_model(models / "llama", "fp32").double(), 0.0
    for first in range(0, len(ids), POSITIONS):
        part = ids[first : first + POSITIONS]
        before = ids[first + len(part) - POSITIONS - 1 : first] if first else [1]
        total += expected(exact, before, part)[0]
    (rolled,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (whole,), 0)])
    assert math.isclose(rolled, total, rel_tol=1e-5)


def test_figures_are_means_over_the_rows_and_differences_are_paired(models, tasks):
    folder, rows = tasks
    result = harness(
        models / "decoder",
        [f"{folder}/tiny_letters.yaml,{folder}/tiny_choices.yaml"],
        against={"base": str(models / "adapter")},
        limit=25,
        batch_size=4,
    )
    tokenizer = load_tokenizer(models / "llama")
    right = {}
    for name, kind in (("model", "decoder"), ("base", "adapter")):
        exact = load_model(models / kind, "fp32").double()
        for task, field in (("tiny_letters", "letters"), ("tiny_choices", "choices")):
            for row in rows[:25]:
                ids = [tokenizer(text)["input_ids"] for text in (row["question"], *row[field])]
                sums = np.array([expected(exact, ids[0], choice)[0] for choice in ids[1:]])
                lengths = np.array([len(choice) for choice in row[field]])
                for metric, scores in (("acc", sums), ("acc_norm", sums / lengths)):
                    right.setdefault((task, metric, name), []).append(scores.argmax() == row["answer"])
    assert {(e["task"], e["metric"]) for e in result["results"]} == {key[:2] for key in right}
    for entry in result["results"]:
        mine, other = (np.array(right[entry["task"], entry["metric"], n], float) for n in ("model", "base"))
        assert (entry["rows"], entry["shots"], entry["higher_is_better"]) == (25, 0, True)
        for name, values in (("model", mine), ("base", other)):
            assert math.isclose(entry["values"][name]["value"], values.mean(), abs_tol=1e-12)
            assert math.isclose(entry["values"][name]["stderr"], values.std(ddof=1) / 5, rel_tol=1e-9, abs_tol=1e-12)
        difference = entry["differences"]["base"]
        assert math.isclose(difference["value"], (mine - other).mean(), abs_tol=1e-12)
        assert math.isclose(difference["stderr"], (mine - other).std(ddof=1) / 5, rel_tol=1e-9, abs_tol=1e-12)
    assert result["models"]["model"]["path"] == str(models / "decoder") and result["models"]["base"]["truncated"] == 0


def test_one_and_two_processes_give_the_same_bits(models, tasks, tmp_path):
    """All kinds of tasks, from a folder, on a command line; a group is the mean over its tasks' rows."""
    folder, _ = tasks
    path = tmp_path / "two.json"
    arguments = ["harness", "--model", str(models / "llama"), "--against", f"fused={models / 'boosted'}"]
    arguments += ["--tasks", str(folder), "--batch-size", "4", "--json", str(path)]
    done = launch("forked", arguments, script=SCRIPT)
    assert done.returncode == 0, done.stderr
    two = json.loads(path.read_text())
    one = harness(models / "llama", [str(folder)], against={"fused": str(models / "boosted")}, batch_size=4)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    compared = [json.loads(json.dumps(entry)) for entry in one["results"]]
    assert compared == two["results"] and len(compared) == 7
    table = [line for line in done.stdout.splitlines() if line.startswith("tiny_")]
    assert len(table) == 7 and "model - fused" in done.stdout
    figures = {(e["task"], e["metric"]): e for e in compared}
    parts = [figures[task, "acc"]["differences"]["fused"]["value"] for task in ("tiny_letters", "tiny_choices")]
    group = figures["tiny_group", "acc"]
    assert group["rows"] == 60 and math.isclose(group["differences"]["fused"]["value"], sum(parts) / 2, abs_tol=1e-12)
    assert group["differences"]["fused"]["stderr"] > 0
    assert figures["tiny_text", "word_perplexity"]["differences"]["fused"]["stderr"] is None  # no mean over rows


def test_a_real_launcher_gives_the_figures_of_one_process(models, tasks, tmp_path):
    """A model with gates beside a base with an adapter and the decoder that the gates were put into, on 2 processes."""
    folder, _ = tasks
    against = {"adapter": str(models / "adapter"), "decoder": str(models / "decoder")}
    names = [f"{folder}/tiny_choices.yaml", f"{folder}/tiny_written.yaml"]
    arguments = ["harness", "--model", str(models / "gates"), "--tasks", *names, "--limit", "9", "--against"]
    arguments += [*(f"{name}={path}" for name, path in against.items()), "--json", str(tmp_path / "two.json")]
    job = start("deepspeed", arguments, script=SCRIPT)
    one = json.loads(json.dumps(harness(models / "gates", names, against=against, limit=9)["results"]))
    assert len(one) == 3
    out, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, out + err
    found = json.loads((tmp_path / "two.json").read_text())
    assert found["world_size"] == 2 and found["results"] == one
    assert out.count("model - adapter") == 1  # one table, of one process


def test_prompts_are_conversations_with_examples_where_asked_for(chats, tasks, monkeypatch):
    folder, rows = tasks
    asked, answer = [], HarnessModel.loglikelihood
    monkeypatch.setattr(
        HarnessModel, "loglikelihood", lambda self, reqs: asked.append([r.args for r in reqs]) or answer(self, reqs)
    )
    task = str(folder / "tiny_letters.yaml")
    options = {"against": {"again": str(chats / "llama")}, "limit": 4, "shots": 2, "chat_template": True}
    result = harness(chats / "llama", [task], **options)
    first, again = asked
    assert first == again and len(first) == 12 and result["results"][0]["shots"] == 2
    tokenizer = load_tokenizer(chats / "llama")
    for row, (context, _) in zip(rows, first[::3], strict=False):
        opening = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], tokenize=False, add_generation_prompt=True
        )
        assert context.endswith(opening) and context.count("<|im_start|>user\n") == 3  # two examples before it
        examples = [other for other in rows if other["question"] in context and other is not row]
        assert len(examples) == 2 and opening not in [other["question"] for other in examples]
        for other in examples:
            assert (
                f"{other['question']}<|im_end|>\n<|im_start|>assistant\n{other['letters'][other['answer']]}" in context
            )


def test_mistakes_are_named_before_weights_are_loaded(models, tasks, tmp_path):
    folder, _ = tasks
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: none.jsonl}}\n")
    (tmp_path / "empty").mkdir()
    letters = str(folder / "tiny_letters.yaml")
    for specs, message in (
        ([str(tmp_path / "none.yaml")], "none.yaml: no such task file"),
        ([str(tmp_path / "empty")], "holds no task files"),
        ([str(broken)], "broken.yaml: cannot be loaded"),
        ([letters, str(folder)], "task tiny_letters: named twice, the second time by"),
        ([str(folder / "tiny_group.yaml")], "describes a group of tasks; name its folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_tasks(specs)
    with pytest.raises(UserError, match="has no chat template"):
        harness(models / "llama", [letters], chat_template=True)
    with pytest.raises(UserError, match="no such file or folder"):
        harness(models / "llama", [letters], against={"other": str(tmp_path / "nothing")})
