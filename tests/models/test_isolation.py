"""Documents of one row do not see each other, in every family that README names: packed equals apart."""

import re

import pytest
import torch
from jobs import ROOT
from test_accelerate import MODELS, build

from ds_llm.compat.transformers import ATTENTION
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM
from ds_llm.models.head import attach_loss_head, lm_loss

LENGTHS = (5, 9, 1, 7)


def decoder(**options) -> DecoderForCausalLM:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return DecoderForCausalLM(DecoderConfig(vocab_size=97, **size, **options)).eval()


MAKERS = {name: lambda name=name: build(name) for name in MODELS}
MAKERS["decoder"] = decoder
MAKERS["decoder with experts"] = lambda: decoder(use_moe=True, n_routed_experts=4, moe_intermediate_size=16)


@pytest.mark.parametrize("name", MAKERS)
def test_packed_equals_apart(name):
    """Summed loss and its gradients of four documents in one row, against each document in a row of its own."""
    torch.manual_seed(3)
    model = attach_loss_head(MAKERS[name]().float())
    vocabulary = model.get_input_embeddings().num_embeddings
    documents = [torch.randint(vocabulary, (1, n)) for n in LENGTHS]
    labels = [torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1) for ids in documents]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    row = {"input_ids": torch.cat(documents, 1), "labels": torch.cat(labels, 1), "position_ids": positions}

    def gradients(batches: list[dict]) -> tuple[float, list]:
        model.zero_grad()
        losses = [lm_loss(model, **batch).loss_sum for batch in batches]
        sum(losses).backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return sum(losses).item(), found

    apart = [{"input_ids": x, "labels": y} for x, y in zip(documents, labels, strict=True) if x.shape[1] > 1]
    expected, others = gradients(apart)
    loss, found = gradients([row])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert found.keys() == others.keys()
    for parameter, gradient in found.items():
        # float32 sums of some twenty terms
        torch.testing.assert_close(
            gradient, others[parameter], rtol=1e-4, atol=1e-4 * float(others[parameter].abs().max())
        )
    leaking, _ = gradients([{**row, "position_ids": torch.arange(sum(LENGTHS))[None]}])
    assert abs(leaking - expected) > 1e-3  # the check sees a row whose documents do see each other


def test_readme_names_these_families():
    named = re.search(r"\*\*Families whose packing is tested\*\*: ([^.]*)\.", (ROOT / "README.md").read_text())[1]
    words = {re.sub(r"\W", "", name).lower() for name in named.replace("\n", " ").split(",")[1:]}
    assert words == {name.replace("_", "") for name in ATTENTION} == {name.lower() for name in MODELS}
