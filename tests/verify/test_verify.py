"""The table of proofs: what holds in sound models, what is refused, and that what is broken is found."""

import json
import shutil
import sys
from dataclasses import dataclass

import pytest
import torch
import transformers
from jobs import ROOT, launch
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaMLP

from ds_llm.commands import verify as command
from ds_llm.compat.transformers import CONFIG_MAPPING
from ds_llm.config import run as configuration
from ds_llm.errors import ConfigError, UserError
from ds_llm.models import hf_kernels
from ds_llm.verify import chats as conversations
from ds_llm.verify import checks, processes, subject, table
from ds_llm.verify.report import BROKEN, HOLDS, REFUSED, Finding, Row, prove

NAMES = ["packed", "kernels", "recomputed", "saved,", "generation", "left", "scores", *4 * ["ZeRO"], "experts", "rows"]


@pytest.fixture(autouse=True)
def one_thread():
    """As the table itself runs: more threads wait for each other at every operation of a small model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def described(folder, kind: str, tokenizer=None, **options):
    """A folder with the configuration of an architecture and perhaps a tokenizer, without weights."""
    CONFIG_MAPPING[kind](**options).save_pretrained(folder)
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def by_name(rows: list[dict]) -> dict[str, dict]:
    assert [row["name"].split()[0] for row in rows] == [*NAMES, "chat:"]
    return {row["name"]: row for row in rows}


def test_all_of_a_llama_holds_but_what_it_does_not_have(chats, tmp_path):
    script, written = ROOT / "launch" / "verify.py", tmp_path / "table.json"
    done = launch("python", [str(chats / "llama"), "--json", str(written)], script=script)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(written.read_text())
    rows = by_name(found["rows"])
    refused = {name: row["detail"] for name, row in rows.items() if row["status"] != HOLDS}
    assert list(refused) == ["experts on two processes = on one"]
    assert "a 'llama' model of this configuration has no experts" in refused.popitem()[1]
    assert found["model_type"] == "llama" and found["model"] == str(chats / "llama")
    assert rows["recomputed layers on = off"]["detail"].startswith("2 layers computed again")
    # two processes sum in another order than one
    assert 0 < rows["ZeRO 3 on two processes = plain torch"]["difference"] < 1e-2
    for line in (*rows, "⟦Mercury, by far.<|im_end|>⟧", "13 hold, 1 refused, 0 broken"):
        assert line in done.stdout


def test_a_hybrid_needs_no_weights_and_a_wrong_cache_is_broken(chats, tmp_path, monkeypatch, capsys):
    whole = DynamicLayer.update

    def forgetful(self, keys, values, *args, **kwargs):
        keys, values = whole(self, keys, values, *args, **kwargs)
        return (torch.cat([x[..., :-1, :], torch.zeros_like(x[..., -1:, :])], -2) for x in (keys, values))

    monkeypatch.setattr(DynamicLayer, "update", forgetful)  # in this process; the job of two generates nothing
    folder = described(tmp_path / "hybrid", "qwen3_next", chats / "tokenizer")
    monkeypatch.setattr(sys, "argv", ["verify.py", str(folder), "--json", str(tmp_path / "table.json")])
    assert command.main() == 1
    rows = by_name(json.loads((tmp_path / "table.json").read_text())["rows"])
    broken = [name for name, row in rows.items() if row["status"] == BROKEN]
    assert broken == ["generation with a cache = without"]
    wrong = rows[broken[0]]
    assert wrong["difference"] > 1e-2 and "where rounding may change 2e-04: the logits of token" in wrong["detail"]
    assert "Qwen3NextGatedDeltaNet document by document" in rows["packed documents = each alone"]["detail"]
    refused = {name.split()[0]: row["detail"] for name, row in rows.items() if row["status"] == REFUSED}
    assert set(refused) == {"rows"}
    assert "parallel.sequence: not known to be right for 'qwen3_next' models" in refused["rows"]
    assert "12 hold, 1 refused, 1 broken" in capsys.readouterr().out


def llama(vocab: int) -> subject.Subject:
    """A small Llama of a vocabulary of its own, so that nothing of it is remembered."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=vocab, **size)
    return subject.Subject("a llama", config, "sdpa", None)


def test_a_leak_between_documents_is_broken(monkeypatch):
    one = llama(71)
    assert prove("", lambda: checks.packing(one)).status == HOLDS
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x) + 0.1 * plain(self, x).cumsum(1))
    row = prove("", lambda: checks.packing(one))
    assert row.status == BROKEN and row.difference > 0.02 and "; attention document by document" in row.detail


def test_wrong_kernels_scores_and_padding_are_broken(monkeypatch):
    one = llama(73)
    monkeypatch.setattr(hf_kernels, "apply_rope", lambda q, k, cos, sin: (q, k))
    row = prove("", lambda: checks.kernels(one))
    assert row.status == BROKEN and "logits; kernels in use: 2 rope" in row.detail
    head = checks.Scorer.score
    monkeypatch.setattr(
        checks.Scorer, "score", lambda self, rows: [row | {"entropy": 1.01} for row in head(self, rows)]
    )
    assert prove("", lambda: checks.scores(one)).status == BROKEN
    complete = checks.Generator.complete

    def unmasked(self, prompts, *args):
        width = max(map(len, prompts))
        return complete(self, [[1] * (width - len(ids)) + ids for ids in prompts], *args)

    assert prove("", lambda: checks.padding(one)).status == HOLDS
    monkeypatch.setattr(checks.Generator, "complete", unmasked)
    row = prove("", lambda: checks.padding(one))
    assert row.status == BROKEN and "tokens of padding" in row.detail


def test_weights_that_are_not_saved_are_broken(monkeypatch):
    write = checks.saving.save

    def incomplete(model, weights, *args):
        write(model, weights | {"lm_head.weight": weights["lm_head.weight"] * 1.001}, *args)

    assert prove("", lambda: checks.saved(llama(75))).status == HOLDS
    monkeypatch.setattr(checks.saving, "save", incomplete)
    assert prove("", lambda: checks.saved(llama(75))).status == BROKEN


def test_what_cannot_pack_is_refused_and_the_rest_is_tried(tmp_path):
    one = subject.of_model(described(tmp_path / "rwkv", "rwkv"))
    row = prove("", lambda: checks.packing(one))
    assert row.status == REFUSED and "'rwkv' models" in row.detail and "set data.packing=false" in row.detail
    assert prove("", lambda: checks.recomputation(one)).detail.startswith(
        "2 layers computed again, rows of one document"
    )


@pytest.mark.parametrize(
    "kind, check", [("nemotron_h", "cache"), ("zamba2", "cache"), ("recurrent_gemma", "padding"), ("rwkv", "padding")]
)
def test_what_the_page_calls_broken_is(kind, check, tmp_path):
    page = (ROOT / "docs" / "models.md").read_text()
    if f"wrongly in transformers {transformers.__version__}," not in page:
        pytest.skip("the page is of another version of transformers")
    one = subject.of_model(described(tmp_path / kind, kind))
    assert prove("", lambda: getattr(checks, check)(one)).status == BROKEN


def test_a_job_that_fails_is_a_broken_row_each(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_LLM_EXTENSIONS", str(tmp_path / "metric.py"))
    with processes.Job(llama(77)) as job:
        rows = list(job.rows())
    assert [row.name for row in rows] == list(processes.CASES)
    assert {row.status for row in rows} == {BROKEN} and "metric.py cannot be run" in rows[0].detail


def test_a_model_of_which_no_small_one_runs_is_refused(monkeypatch):
    one = llama(79)
    monkeypatch.setattr(subject, "small_configs", lambda config: iter(()))
    rows = list(table.rows(one))
    assert [row.status for row in rows[:-1]] == [REFUSED] * len(NAMES) and "no small 'llama' model runs" in rows[
        0
    ].detail
    assert rows[-1].status == REFUSED and "set data.tokenizer" in rows[-1].detail


def test_chats_that_train_the_questions_are_broken_and_without_a_template_refused(chats, tmp_path):
    from ds_llm.pretrained.loading import load_tokenizer

    def row(template: str | None) -> Row:
        tokenizer = load_tokenizer(chats / "tokenizer")
        tokenizer.chat_template = template
        folder = tmp_path / f"tokenizer-{len(list(tmp_path.iterdir()))}"
        tokenizer.save_pretrained(folder)
        one = llama(81)
        one.tokenizer = str(folder)
        return prove("", lambda: conversations.check(one))

    good = load_tokenizer(chats / "tokenizer").chat_template
    assert row(good).status == HOLDS
    swapped = row(good.replace("{% if message['role'] == 'assistant' %}", "{% if message['role'] == 'user' %}"))
    assert swapped.status == BROKEN and "is not trained whole: 'Which planet" in swapped.detail
    none = row(None)
    assert none.status == REFUSED and "put a chat_template.jinja into its folder" in none.detail


def test_mistakes_of_a_user_end_with_2(chats, tmp_path, monkeypatch):
    for words, message in (
        ([str(tmp_path / "nowhere")], "no such file or folder"),
        (["--config", str(ROOT / "ds_configs/recipes/sft.yaml"), "model.path=null"], "model.path: mode=sft"),
        ([str(chats / "llama"), "--json", str(tmp_path / "no" / "table.json")], "there is no folder"),
        (["--config", str(ROOT / "ds_configs/recipes/sft.yaml"), "model.pth=x"], "model.pth"),
    ):
        monkeypatch.setattr(sys, "argv", ["verify.py", *words])
        with pytest.raises(UserError, match=message) as found:
            command.main()
        assert found.value.exit_code == 2
    monkeypatch.setattr(sys, "argv", ["verify.py"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2


def test_a_run_is_proved_as_it_is_configured(chats):
    keys = [f"model.path={chats / 'llama'}", "model.attention=eager", "data.train_on=last"]
    one = subject.of_run(configuration.load(str(ROOT / "ds_configs/recipes/sft.yaml"), keys))
    assert (one.attention, one.train_on) == ("eager", "last")
    row = prove("", lambda: conversations.check(one))
    assert row.status == HOLDS
    labels, tokenizer = row.shown[2:]
    assert tokenizer.decode(labels[labels >= 0]) == "Mercury, by far.<|im_end|>"
    own = subject.of_run(configuration.load(None, ["mode=pretrain", "model.use_moe=true"]))
    assert own.config.model_type == "ds_llm_decoder" and own.small.n_routed_experts > 1
    with pytest.raises(ConfigError, match=r"model\.path"):
        subject.of_run(configuration.load(None, ["mode=dpo"]))


@dataclass
class Raises:
    error: Exception

    def __call__(self) -> Finding:
        raise self.error


def test_an_exception_is_a_row_of_one_line():
    assert prove("a", Raises(UserError("use b"))).detail == "use b"
    row = prove("a", Raises(ValueError("first\nsecond")))
    assert (row.status, row.detail, row.difference) == (BROKEN, "ValueError: first", None)
    assert prove("a", lambda: Finding("x", float("nan"), 1.0)).status == BROKEN
