"""Sweep files: the ready ones are sound, mistakes are found before the first trial, W&B's own agent can run them."""

import runpy
import sys
from pathlib import Path

import jobs
import pytest
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from ds_llm.errors import ConfigError
from ds_llm.sweeps import agents, file
from ds_llm.sweeps import slots as places

READY = sorted((jobs.ROOT / "ds_configs" / "sweeps").glob("*.yaml"))
SOUND = {
    "method": "random",
    "metric": {"name": "eval/perplexity"},
    "parameters": {"optim.lr": {"min": 1e-4, "max": 1e-2}, "train.batch_size": {"values": [2, 4]}},
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a sweep file, `SOUND` with other keys, and reads it."""
    monkeypatch.chdir(jobs.ROOT)

    def read(mode=None, overrides=("data.val=v.bin",), **keys):
        path = tmp_path / "sweep.yaml"
        kept = {k: v for k, v in (SOUND | keys).items() if v is not None}
        OmegaConf.save(OmegaConf.create(kept), path)
        return file.read(str(path), mode, list(overrides))

    return read


def test_there_is_a_ready_sweep_for_each_mode(monkeypatch):
    monkeypatch.chdir(jobs.ROOT)
    assert {"pretrain", "sft", "lora", "dpo", "router", "sparse"} == {path.stem for path in READY}
    for path in READY:
        found = file.read(str(path), path.stem, [])
        assert found.config.mode == {"lora": "sft"}.get(path.stem, path.stem)
        assert found.config.lora.enabled == (path.stem in ("lora", "dpo"))
        assert found.method == "bayes" and found.early and found.varying
        assert Path(found.command[2]).resolve() == jobs.ROOT / "launch" / "train.py"


def test_the_trials_of_a_file_are_commands_of_the_launch_script(written, monkeypatch):
    recipe = "ds_configs/recipes/pretrain.yaml"
    command = ["${env}", "PYTHONWARNINGS=${envvar:W}", "${interpreter}", "${program}", "--config", recipe, "zero=1"]
    monkeypatch.setenv("W", "ignore")
    found = written("sft", ["optim.eps=1e-9"], command=[*command, "${args_no_hyphens}"])
    words = found.words({"optim.lr": "0.001"}, "output=here")
    assert words[:3] == ["/usr/bin/env", "PYTHONWARNINGS=ignore", sys.executable]
    fixed = ["mode=sft", "optim.eps=1e-9", "output=here"]
    assert words[3:] == ["launch/train.py", "--config", recipe, "zero=1", "optim.lr=0.001", *fixed]
    assert (found.config.mode, found.config.zero, found.config.optim.eps) == ("sft", 1, 1e-9)


@pytest.mark.parametrize(
    "keys, text",
    [
        ({"methods": "grid"}, "unknown key 'methods'; did you mean 'method'?"),
        ({"method": "tpe"}, "method: 'tpe' is not bayes, random or grid"),
        ({"program": "train.py"}, "program: train.py: trials run launch/train.py"),
        ({"command": ["${program}"]}, "must hold ${program} and ${args_no_hyphens}"),
        ({"command": ["${program}", "${args}", "${args_no_hyphens}"]}, "launch/train.py takes key=value"),
        ({"command": ["${python}", "${program}", "${args_no_hyphens}"]}, "${python} is not known"),
        ({"command": ["${program}", "--resume", "x", "${args_no_hyphens}"]}, "only --config and key=value"),
        ({"command": ["${program}", "--config", "no.yaml", "${args_no_hyphens}"]}, "no.yaml: no such config"),
        ({"command": ["${envvar:NOT_SET_X}", "${program}", "${args_no_hyphens}"]}, "NOT_SET_X is not set"),
        ({"parameters": {"optim.lrr": {"value": 1}}}, "parameters: unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ({"parameters": {"learning_rate": {"value": 1}}}, "parameters: unknown key 'learning_rate'"),
        ({"parameters": {"optim": {"value": 1}}}, "'optim' is a section"),
        ({"parameters": {"optim.lr": {"values": [0.1, 0.0]}}}, "optim.lr: 0.0 must be greater than 0"),
        ({"parameters": {"train.dtype": {"values": ["fp32", "bf61"]}}}, "did you mean 'bf16'?"),
        ({"parameters": {"optim.lr": {"distribution": "normal", "mu": -1}}}, "optim.lr: -1.0 must be greater than 0"),
        ({"parameters": {"train.batch_size": {"min": 1.0, "max": 4}}}, "takes whole numbers and uniform draws others"),
        ({"parameters": {"output": {"values": ["a", "b"]}}}, "the sweep sets it for each trial"),
        ({"method": "grid"}, "optim.lr: uniform has no grid"),
        ({"metric": {"name": "perplexity"}}, "has no 'perplexity'; did you mean 'eval/perplexity'?"),
        ({"metric": {"name": "eval/perplexty"}}, "did you mean 'eval/perplexity'?"),
        ({"metric": {"name": "eval/loss", "goal": "min"}}, "goal: 'min' is not minimize or maximize"),
        ({"metric": {"name": "eval/loss", "aim": 3}}, "unknown key 'aim'"),
        ({"metric": {"name": "eval/loss", "target": "low"}}, "target: 'low' is not a number"),
        ({"metric": None, "method": "bayes"}, "metric: name the figure to compare trials by"),
        ({"run_cap": 0}, "run_cap: 0 must be a whole number of at least 1"),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate: needs either min_iter"),
    ],
)
def test_mistakes_are_found_before_the_first_trial(written, keys, text):
    with pytest.raises(ConfigError) as error:
        written(**keys)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_mistakes_of_the_call_are_found_too(written, monkeypatch):
    for arguments, text in (
        ({"overrides": []}, "eval/perplexity needs data.val"),
        ({"mode": "dbo"}, "--mode: unknown 'dbo'; did you mean 'dpo'?"),
        ({"overrides": ["data.val=v", "optim.lr=3"]}, "optim.lr: is also set to one value"),
        ({"overrides": ["data.val=v", "optim.x=3"]}, "unknown key 'optim.x'"),
    ):
        with pytest.raises(ConfigError) as error:
            written(**arguments)
        assert text in str(error.value)
    import torch

    wrong = [(0, "0", "there is no GPU"), (2, "0,2", "no GPU 2; they are 0 to 1")]
    for count, gpus, text in [*wrong, (2, "0;1", "not a list"), (2, "1,1", "twice")]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(ConfigError) as error:
            places.slots(gpus, None)
        assert text in str(error.value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert places.slots("0,3", None) == ["0", "3"] and places.slots("0+1,2+3", None) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")  # as a scheduler gives them out
    assert places.slots("0,3", None) == ["4", "7"]
    assert places.slots(None, 3) == [None] * 3 and places.slots(None, None) == [None]


def test_wandbs_agent_starts_the_same_trials(written, tmp_path, monkeypatch):
    """The command that W&B is given, with the macros replaced by its own agent's code, is one that train.py takes."""
    values = {"optim.lr": 0.0003, "optim.betas": [0.9, 0.99], "ema.enabled": True, "data.tokenizer": "a b"}
    sections = {name: {"values": [value]} for name, value in values.items()}
    found = agents.definition(written("sft", parameters=sections), tmp_path / "out")
    arguments = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    words = []
    for word in create_sweep_command(list(found["command"])):
        words += arguments["args_no_hyphens"] if word == "${args_no_hyphens}" else [word]
    words = [found["program"] if word == "${program}" else word for word in words]
    assert words[:3] == ["${env}", "${interpreter}", "launch/train.py"]
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    monkeypatch.setattr(sys, "argv", [words[2], *words[3:], "--print-config"])
    shown = []
    monkeypatch.setattr("builtins.print", lambda *parts, **_: shown.append(parts[0]))
    with pytest.raises(SystemExit):
        runpy.run_path(str(jobs.ROOT / "launch" / "train.py"), run_name="__main__")
    config = OmegaConf.create("".join(shown))
    for name, value in values.items():
        assert OmegaConf.select(config, name) == value
    assert config.output == f"{tmp_path}/out/trials/abc123" and config.tracking.wandb.enabled and config.mode == "sft"
    with pytest.raises(ConfigError, match="writes None for null"):
        agents.definition(written(parameters={"model.n_kv_heads": {"values": [None, 2]}}), tmp_path)
