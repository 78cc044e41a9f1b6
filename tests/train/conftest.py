"""Models with quality gates, and a run that trains these."""

from pathlib import Path

import pytest
from gated import pair
from jobs import TRACKED


@pytest.fixture(scope="session")
def models(corpus, chats, tmp_path_factory) -> Path:
    """Folder with the Select-MoE models `decoder` and `chat`, see `gated.pair`."""
    return pair(tmp_path_factory.mktemp("gated"), corpus, chats)


@pytest.fixture
def gate_training(corpus, models, monkeypatch, tmp_path_factory) -> list[str]:
    """Arguments of a run of two steps that trains the gates of `decoder`, in fp32."""
    monkeypatch.setenv("DS_LLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    return [
        *("mode=router", f"model.path={models / 'decoder'}", f"data.train={corpus / 'train.bin'}"),
        *("data.seq_len=32", "data.subset_ratio=0.4", "train.dtype=fp32", "train.max_steps=2", "optim.lr=1e-2"),
        *("eval.before=false", *TRACKED),
    ]
