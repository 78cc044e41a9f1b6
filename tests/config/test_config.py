"""The configuration: what is merged, what is refused and how it says so."""

from pathlib import Path

import pytest

from ds_llm.boosting.recipe import BoostingConfig
from ds_llm.config import options
from ds_llm.config import run as config
from ds_llm.errors import ConfigError
from ds_llm.selection.options import SelectionConfig

ROOT = Path(__file__).parents[2]


def test_file_then_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optim: {lr: 1e-3, betas: [0.8, 0.9]}\nmodel: {dim: 128}\neval: {prompts: [a, b]}\n")
    found = config.load(str(file), ["optim.lr=2e-3", "data.train=one.bin", "eval.prompts=[x]", "deepspeed.fp16.x=1"])
    assert (found.optim.lr, found.optim.betas, found.model.dim) == (2e-3, [0.8, 0.9], 128)
    assert found.data.train == ["one.bin"] and found.eval.prompts == ["x"]
    assert found.deepspeed == {"fp16": {"x": 1}}


def test_saved_configuration_loads_as_the_same(tmp_path):
    before = config.load(None, ["optim.lr=1e-5", "model.use_moe=true", "ema.enabled=true", "zero=3"])
    (tmp_path / "config.yaml").write_text(options.to_yaml(before))
    assert config.load(str(tmp_path / "config.yaml")) == before


def test_overrides_merge_in_turn():
    found = config.load(None, ["optim.lr=1", "deepspeed=x.json", "data.val=[a,b]", "optim.lr=2", "data.val=c"])
    assert (found.optim.lr, found.deepspeed, found.data.val) == (2.0, "x.json", ["c"])
    found = config.load(None, ["deepspeed=x.json", "deepspeed.a.b=1", "deepspeed={c: 2}", "data.train=${output}/x.bin"])
    assert found.deepspeed == {"a": {"b": 1}, "c": 2} and found.data.train == ["runs/pretrain/x.bin"]
    for wrong in ("optim.lr=fast", "optim.lrr=1", "optim.lr=["):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
            config.load(None, ["model.dim=64", wrong, "zero=1"])


@pytest.mark.parametrize(
    "override, text",
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("lr=1", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("trian.epochs=1", "did you mean 'train.epochs'?"),
        ("optim=1", "'optim' is a section"),
        ("optim.lr=fast", "optim.lr"),
        ("optim.lr=0", "optim.lr: 0.0 must be greater than 0"),
        ("optim.lr=nan", "optim.lr: nan is not a finite number"),
        ("model.dropout=1", "model.dropout: 1.0 must be less than 1"),
        ("train.batch_size=1.5", "train.batch_size"),
        ("zero=4", "zero: 4 is not one of 0, 1, 2, 3"),
        ("train.dtype=fp61", "did you mean 'fp16'?"),
        ("optim.schedule=cosin", "did you mean 'cosine'?"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("model.n_heads=7", "model.dim: 512 is not divisible by model.n_heads=7"),
        ("model.n_kv_heads=3", "does not divide"),
        ("eval.early_stopping=true", "needs data.val"),
        ("deepspeed=[1]", "deepspeed"),
        ("nonsense", "'nonsense' is not an override"),
        ("optim.lr=[", "optim.lr: cannot read the value"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(override, text):
    with pytest.raises(ConfigError) as raised:
        config.load(None, [override])
    assert text in str(raised.value) and "\n" not in str(raised.value)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    "content, text", [("- a\n", "not a list"), ("a: [", "not a readable YAML"), ("a: 1", "unknown key")]
)
def test_unreadable_files(tmp_path, content, text):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=text):
        config.load(str(file))
    with pytest.raises(ConfigError, match="no such configuration file"):
        config.load(str(tmp_path / "missing.yaml"))


def test_every_key_is_documented():
    assert all(f.metadata.get("help") for f in options.fields(config.Config).values())
    table = (ROOT / "docs" / "configuration.md").read_text()
    assert options.markdown(config.Config) in table, (
        "run python -m ds_llm.config, and put its table into docs/configuration.md"
    )


@pytest.mark.parametrize("recipe", sorted((ROOT / "ds_configs" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_valid(recipe):
    others = {"boost": BoostingConfig, "select": SelectionConfig}
    if recipe.stem in others:
        options.load(others[recipe.stem], str(recipe))
    else:
        config.load(str(recipe))
