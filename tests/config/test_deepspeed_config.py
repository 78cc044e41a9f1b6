"""The user's DeepSpeed JSON: "auto" filled in, numbers that win, mistakes named."""

import json
from pathlib import Path

import pytest

from ds_llm.config import deepspeed as deepspeed_config
from ds_llm.config import run as config
from ds_llm.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "ds_configs"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_shipped_files_resolve_like_the_key(stage, dtype):
    common = [f"train.dtype={dtype}", "optim.lr=1e-5", "train.accumulation_steps=3"]
    by_key = config.load(None, [f"zero={stage}", *common])
    by_file = config.load(None, [f"deepspeed={FOLDER / f'zero{stage}.json'}", *common])
    deepspeed_config.adopt(by_file, 4)
    assert by_file.zero == stage
    built = deepspeed_config.build(by_file, 4)
    assert built == deepspeed_config.build(by_key, 4)
    assert not deepspeed_config.has_auto(built)


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_files(stage):
    used = config.load(None, [f"deepspeed={FOLDER / f'zero{stage}_offload.json'}"])
    deepspeed_config.adopt(used, 2)
    built = deepspeed_config.build(used, 2)
    assert used.zero == stage and built["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "torch_adam" not in built["optimizer"]["params"]  # DeepSpeed's own CPU Adam


def adopted(user: dict, *overrides: str, world: int = 2):
    used = config.load(None, list(overrides))
    used.deepspeed = user
    return used, deepspeed_config.adopt(used, world)


def test_numbers_of_the_file_replace_the_runs_and_are_reported():
    used, notes = adopted(
        {
            "train_batch_size": 48,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 0.5,
            "fp16": {"enabled": True},
            "optimizer": {"type": "Adam", "params": {"lr": 7e-4, "betas": [0.8, 0.99], "weight_decay": "auto"}},
        },
        "train.batch_size=16",
    )
    assert (used.train.batch_size, used.train.accumulation_steps, used.train.dtype) == (4, 6, "fp16")
    assert (used.optim.lr, used.optim.betas, used.optim.grad_clip) == (7e-4, [0.8, 0.99], 0.5)
    assert (
        used.optim.name == "adam"
        and len(notes) == 7
        and any(n.startswith("train_micro_batch_size_per_gpu=4 of") for n in notes)
    )
    built = deepspeed_config.build(used, 2)
    assert built["optimizer"]["type"] == "Adam" and built["fp16"]["enabled"] and not built["bf16"]["enabled"]


def test_another_optimizer_gets_only_what_the_file_asks_for():
    used, _ = adopted({"optimizer": {"type": "Lion", "params": {"lr": "auto", "betas": "auto", "x": 1}}})
    params = deepspeed_config.build(used, 2)["optimizer"]["params"]
    assert params == {"lr": used.optim.lr, "betas": used.optim.betas, "x": 1}


@pytest.mark.parametrize(
    "user, text",
    [
        ({"train_batch_size": 30}, "train_batch_size: 30 is not 8 samples x 2 processes"),
        ({"zero_optimization": {"stage": 5}}, "stage: 5 is not one of"),
        ({"zero_optimization": 2}, "zero_optimization: 2 must be a JSON object"),
        ({"fp16": True}, "fp16: True must be a JSON object"),
        ({"optimizer": "AdamW"}, "optimizer: 'AdamW' must be a JSON object"),
        ({"train_batch_size": "x"}, "train_batch_size: 'x' is not a positive whole number"),
        ({"gradient_accumulation_steps": 0}, "train.accumulation_steps: 0 must be at least 1"),
        ({"optimizer": {"params": {"lr": -1}}}, "optim.lr: -1.0 must be greater than 0"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "both enabled"),
        ({"optimizer": {"params": {"lr": "high"}}}, "optimizer.params.lr: 'high' is not float"),
        ({"flops_profiler": {"module_depth": "auto"}}, '"auto" is not known for this key'),
    ],
)
def test_mistakes_are_named(user, text):
    with pytest.raises(ConfigError) as raised:
        used, _ = adopted(user)
        deepspeed_config.build(used, 2)
    assert text in str(raised.value)


def test_broken_files(tmp_path):
    for name, content, text in (("a", "{", "not JSON"), ("b", "[]", "must be a JSON object")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=text):
            deepspeed_config.read(str(tmp_path / name))
    (tmp_path / "c").write_text(json.dumps({"x": 1}))
    assert deepspeed_config.read(str(tmp_path / "c")) == {"x": 1}
