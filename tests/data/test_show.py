import io
import json

import numpy as np
import pytest
from jobs import ROOT, launch
from rich.console import Console

from ds_llm.commands import show
from ds_llm.config import run as config
from ds_llm.data.tokenizer import load_tokenizer
from ds_llm.errors import UserError


def printed(monkeypatch, colours: bool) -> io.StringIO:
    out = io.StringIO()
    options = {"force_terminal": True, "color_system": "standard"} if colours else {}
    monkeypatch.setattr(show, "console", Console(file=out, soft_wrap=True, highlight=False, markup=False, **options))
    return out


@pytest.mark.parametrize("colours", [True, False])
def test_trained_tokens_stand_out_and_the_text_is_whole(tokenizer_folder, monkeypatch, colours):
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = np.array(tokenizer("naïve [b]of[/b] the 😀 the", add_special_tokens=False)["input_ids"], np.int64)
    trained = np.arange(len(ids)) % 7 >= 5  # also runs that begin or end inside a character
    labels = np.append(np.where(trained[1:], ids[1:], show.IGNORE), show.IGNORE)
    out = printed(monkeypatch, colours)
    show.show_sample("sample 0", ids, labels, tokenizer)
    head, body = out.getvalue().split("\n", 1)
    assert f"{len(ids)} tokens, {trained[1:].sum()} trained" in head
    changes = np.flatnonzero(np.diff(np.append(False, trained[1:]))) + 1
    runs = [tokenizer.decode(part) for part in np.split(ids, changes)]
    styles = ("\x1b[2m", "\x1b[0m"), ("\x1b[1;32m", "\x1b[0m")
    marks = styles if colours else (("", ""), show.BRACKETS)
    assert body.rstrip("\n") == "".join(run.join(marks[k % 2]) for k, run in enumerate(runs))


def test_a_recipe_is_shown_as_it_is_trained(chats, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_LLM_CACHE", str(tmp_path / "cache"))
    rows = (chats / "train.jsonl").read_text() + '{"messages": []}\n'
    (tmp_path / "train.jsonl").write_text(rows)
    (tmp_path / "recipe.yaml").write_text("mode: sft\ndata:\n  seq_len: 96\n")
    done = launch(
        "forked-1",
        [
            *["show", "--config", str(tmp_path / "recipe.yaml"), "--samples", "2", f"model.path={chats / 'llama'}"],
            *[f"data.train=[{tmp_path / 'train.jsonl'},{chats / 'val.jsonl'}]", "data.weights=[1,0.5]"],
        ],
        script=ROOT / "launch" / "prepare.py",
    )
    assert done.returncode == 0, done.stderr
    first = json.loads(rows.splitlines()[0])["messages"]
    said = "".join(
        f"<|im_start|>{m['role']}\n"
        + (f"{m['content']}<|im_end|>".join(show.BRACKETS) if m["role"] == "assistant" else f"{m['content']}<|im_end|>")
        + "\n"
        for m in first
    )
    assert said in done.stdout and "sample 159:" in done.stdout
    table = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines()}
    counts = next(line.split() for line in done.stdout.splitlines() if "151" in line)
    assert counts[-6:-2] == ["151", "1", "0", "150"]
    assert table["all that is drawn"][-6:-2] == ["171", "1", "0", "160"]
    assert "drawn, weight 0.5" in done.stdout and "rejects.jsonl" in done.stdout
    assert table["empty"][1] == "1"


def test_only_samples_with_masks_are_shown():
    with pytest.raises(UserError, match="mode=pretrain"):
        show.show_run(config.load(None, []), 1)
