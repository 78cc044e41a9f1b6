import pytest

from ds_llm.checkpoint import resume
from ds_llm.config import options
from ds_llm.config import run as config
from ds_llm.errors import UserError


def test_evaluations_compare_only_when_measured_alike():
    saved = {"config": options.to_dict(config.load(None, ["data.val=a.bin", "eval.stride=4", "eval.token_length=8"]))}
    same = ["data.val=a.bin", "eval.stride=4", "eval.token_length=8", "eval.every_steps=3", "eval.batch_size=2"]
    assert resume.measures_alike(config.load(None, same), saved)
    for other in ("data.val=b.bin", "eval.stride=5", "eval.token_length=9", "eval.max_windows=1"):
        assert not resume.measures_alike(config.load(None, [*same, other]), saved), other


def test_a_run_of_an_earlier_version_continues(tmp_path):
    now = config.load(None, ["data.train=a.bin", "tracking.wandb.log_every=3"])
    saved = {"config": options.to_dict(now), "fingerprint": {}, "world_size": 1}
    del saved["config"]["lora"], saved["config"]["data"]["truncate"]
    assert resume.check_same_run(now, saved, {}, tmp_path) == []
    other = config.load(None, ["data.train=a.bin", "data.truncate=drop"])
    with pytest.raises(UserError, match=r"data\.truncate: the run in .* has 'right', not 'drop'"):
        resume.check_same_run(other, saved, {}, tmp_path)
