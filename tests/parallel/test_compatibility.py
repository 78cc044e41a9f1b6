"""What goes together: the table, its place in the docs, and how a refusal reads."""

from pathlib import Path

import pytest

from ds_llm.config.deepspeed import adopt, build
from ds_llm.config.modes import MODES
from ds_llm.config.run import load
from ds_llm.errors import ConfigError, UserError
from ds_llm.parallel import compatibility as combinations
from ds_llm.parallel import parallelize as division

ROOT = Path(__file__).parents[2]
# what brings each feature into a run
ASKED = {
    "expert": ["parallel.expert=2", "model.use_moe=true"],
    "sequence": ["parallel.sequence=2"],
    "tensor": ["parallel.tensor=2"],
    "experts": ["model.use_moe=true"],
    "lora": ["lora.enabled=true"],
    "nf4": ["lora.enabled=true", "lora.quantize=nf4"],
    "freeze": ["model.freeze=[model.layers.0]"],
    "ema": ["ema.enabled=true"],
    "muon": ["optim.name=muon", "optim.grad_clip=0"],
    "adamw8bit": ["optim.name=adamw8bit"],
    "generation": ["eval.generation_metrics=[bleu]"],
    "offload_optimizer": ["deepspeed.zero_optimization.offload_optimizer.device=cpu"],
    "offload_param": ["zero=3", "deepspeed.zero_optimization.offload_param.device=cpu"],
    "nvme": ["deepspeed.zero_optimization.offload_optimizer.device=nvme"],
    "hpz": ["zero=3", "deepspeed.zero_optimization.zero_hpz_partition_size=2"],
    "quantized_gradients": ["zero=3", "deepspeed.zero_optimization.zero_quantized_gradients=true"],
    **{f"zero{stage}": [f"zero={stage}"] for stage in range(4)},
    **{name: [f"mode={name}"] for name, mode in MODES.items() if mode.refuses},
    "fp16": ["train.dtype=fp16"],
}


def asked(*names: str):
    config = load(None, [key for name in names for key in ASKED[name]])
    adopt(config, 4)
    return config


@pytest.mark.parametrize("first, second, reason", combinations.REFUSED)
def test_refused_pairs_name_both_keys_and_the_reason(first, second, reason):
    config = asked(first, second)
    assert {first, second} <= combinations.features(config)
    if first == "tensor" and second == "expert":
        config.model.use_moe = False  # another pair of the table
    with pytest.raises(ConfigError) as error:
        combinations.check(config, 4)
    text = str(error.value)
    assert reason in text and text.count("\n") == 0
    for name in (first, second):
        assert combinations.KEYS[name].format(config) in text
    for name in (first, second):  # neither is refused for itself
        alone = asked(name)
        combinations.check(alone, 4)


def test_every_feature_is_one_that_a_run_can_have():
    assert ASKED.keys() == combinations.KEYS.keys()
    for name in ASKED:
        assert name in combinations.features(asked(name)), name


def test_the_table_of_the_docs_is_this_one():
    assert combinations.markdown() in (ROOT / "docs" / "parallelism.md").read_text(), (
        "run python -m ds_llm.parallel.compatibility, and put its table into docs/parallelism.md"
    )


@pytest.mark.parametrize(
    "keys, world, text",
    [
        (["parallel.tensor=3"], 4, "parallel.tensor: 3 does not divide the 4 processes"),
        (["parallel.expert=2", "model.use_moe=true"], 3, "parallel.expert: 2 does not divide the 3 processes"),
        (["parallel.expert=2"], 2, "parallel.expert: a 'ds_llm_decoder' model of this configuration has no experts"),
        (["parallel.expert=3", "model.use_moe=true"], 3, "parallel.expert: 3 does not divide the model's 8 experts"),
        (["parallel.sequence=3"], 3, "parallel.sequence: 3 does not divide the model's 8 attention heads"),
        (["parallel.sequence=4", "model.n_kv_heads=2"], 4, None),
        (
            ["parallel.sequence=6", "model.n_heads=12", "model.dim=384", "model.n_kv_heads=4"],
            6,
            "parallel.sequence: 6 and the model's 4 key/value heads do not divide each other",
        ),
        (
            ["parallel.tensor=4", "model.n_kv_heads=2"],
            4,
            "parallel.tensor: 4 does not divide the model's num_key_value",
        ),
        (["parallel.tensor=0"], 2, "parallel.tensor: 0 must be at least 1"),
        (["deepspeed.tensor_parallel.autotp_size=3"], 4, "parallel.tensor: 3 does not divide the 4 processes"),
        (["deepspeed.expert_parallel.top_k=1"], 2, "expert_parallel.top_k: only autoep_size is used"),
    ],
)
def test_groups_that_cannot_be_are_one_line(keys, world, text):
    def run():
        config = load(None, keys)
        adopt(config, world)
        combinations.check(config, world)
        division.check(config)

    if text is None:
        return run()
    with pytest.raises((ConfigError, UserError)) as error:
        run()
    assert text in str(error.value)


def test_a_users_json_asks_for_the_same_and_passes_the_rest_on():
    zero = {"stage": 3, "zero_hpz_partition_size": 2, "zero_quantized_weights": True, "zero_quantized_gradients": True}
    zero |= {"stage3_prefetch_bucket_size": 1234, "sub_group_size": 4321}
    config = load(None)
    config.deepspeed = {
        "zero_optimization": zero,
        "tensor_parallel": {"autotp_size": 0},
        "sequence_parallel_size": 2,
        "expert_parallel": {"enabled": True, "autoep_size": 2},
        "train_batch_size": 64,
        "communication_data_type": "fp32",
    }
    notes = adopt(config, 8)
    assert (config.parallel.expert, config.parallel.sequence, config.parallel.tensor) == (2, 2, 1)
    assert config.train.batch_size * config.train.accumulation_steps * 4 == 64  # 8 processes are 4 groups
    assert any("sequence_parallel_size=2" in note for note in notes)
    settings = build(config, 8)
    assert zero.items() <= settings["zero_optimization"].items()
    assert settings["communication_data_type"] == "fp32"
    assert not settings.keys() & {"tensor_parallel", "sequence_parallel_size", "expert_parallel"}
