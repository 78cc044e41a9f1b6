"""Causal architectures of transformers as tiny models, from the library's own default configurations.

python tests/models/architectures.py > docs/models.md    writes how each keeps packed documents apart
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterable
from functools import cache

import torch
import transformers

from ds_llm.compat.transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from ds_llm.models.cut import small_configs, small_model
from ds_llm.models.isolation import find_way
from ds_llm.parallel.sequence import MODEL_TYPES

HYBRID = ["conv", "conv", "full_attention", "conv"] * 8
# model types, with what their default configuration lacks or has in a form that shows less than users' models do
ARCHITECTURES: dict[str, dict] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "bamba": {"attn_layer_indices": [1, 3]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {},
    "cohere": {},
    "cohere2": {},
    "ctrl": {},
    "cwm": {},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v3": {},
    "diffllama": {},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "exaone_moe": {},
    "falcon": {},
    "falcon_h1": {},
    "falcon_mamba": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {},
    "gpt_neox": {},
    "gpt_oss": {},
    "gptj": {},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "jamba": {},
    "jetmoe": {},
    "kimi_linear": {},
    "lfm2": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": HYBRID},
    "llama": {},
    "llama4_text": {},
    "mamba": {},
    "mamba2": {},
    "minimax": {},
    "minimax_m2": {},
    "ministral": {"head_dim": 128},
    "mistral": {"sliding_window": 64},
    "mixtral": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {"num_key_value_heads": 8},
    "nemotron_h": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": {},
    "olmoe": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_text": {},
    "qwen3_5_moe_text": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "recurrent_gemma": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
    "xglm": {},
    "zamba2": {},
}
# whose documents cannot be kept apart: they take neither a mask of documents nor run document by document
REFUSED = ("cpmant", "openai-gpt", "rwkv")
# whose experts are fused and recognised; `NOT_SHARED` cannot be divided among processes
FUSED_EXPERTS = (
    *("afmoe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "gpt_oss"),
    *("granitemoe", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "jamba", "kimi_linear", "lfm2_moe"),
    *("minimax", "minimax_m2", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text"),
    *("qwen3_moe", "qwen3_next"),
)
NOT_SHARED = ("gpt_oss", "nemotron_h")
OTHER_EXPERTS = ("jetmoe", "llama4_text")


@cache
def configuration(name: str):
    """The default configuration of an architecture, complete."""
    return CONFIG_MAPPING[name](**ARCHITECTURES.get(name, {}))


def attention_of(config) -> str:
    """The attention kernel that a model of a configuration uses where none is asked for."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = model[0] if isinstance(model, tuple) else model
    return "sdpa" if model._supports_sdpa else "eager"


def tiny(name: str):
    """A tiny model of an architecture with random weights, float32: the smallest that runs."""
    transformers.logging.set_verbosity_error()
    config = configuration(name)
    for small in small_configs(config):
        model = small_model(small, attention_of(config), torch.device("cpu"))
        with contextlib.suppress(RuntimeError), torch.no_grad():
            model(input_ids=torch.full((1, 3), 2), use_cache=False)
            return model
    raise AssertionError(f"no tiny {name} runs")


def markdown() -> str:
    """docs/models.md, from what is found for every architecture."""
    transformers.logging.set_verbosity_error()
    ways: dict[str, list[str]] = {"document by document": [], "mixed": [], "mask": []}
    for name in sorted(ARCHITECTURES):
        config = configuration(name)
        way = find_way(config, attention_of(config), torch.device("cpu"))
        kind = "mixed" if way.modules else "document by document" if way.by_document else "mask"
        ways[kind].append(f"`{name}` ({', '.join(way.modules)})" if way.modules else f"`{name}`")
    plain, mixed, masked = (textwrap.fill(", ".join(names) + ".", 118) for names in ways.values())
    return PAGE.format(
        version=transformers.__version__,
        count=len(ARCHITECTURES),
        plain=plain,
        mixed=mixed,
        masked=masked,
        refused=_names(REFUSED),
        count_rows=len(MODEL_TYPES) - 1,
        rows=textwrap.fill(_names(MODEL_TYPES[1:]) + ".", 118),
        fused=textwrap.fill(_names(FUSED_EXPERTS) + ".", 118),
        unshared=_names(NOT_SHARED),
        other=_names(OTHER_EXPERTS),
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


PAGE = """# Models

```
python launch/train.py --config ds_configs/recipes/sft.yaml model.path=FOLDER_OR_HUB_NAME
```

Every causal language model of transformers trains, scores and is pruned as it is. Packing asks more of a model:
documents in one row must not see each other. A model in which they do trains on wrong losses, and nothing else shows
it. So no architecture is trusted.

## What is checked before the first step

Before a model is loaded, a small one of the same configuration is made: the first layers that show every kind of
layer, few heads and experts, short windows, random weights. It runs packed documents and each document alone. Outputs
and all gradients must be equal, to rounding in float32. This takes from 0.1 to a few seconds, and no step starts
without it.

A run says what was found:

```
packed documents: attention document by document, Qwen3NextGatedDeltaNet document by document
```

If documents see each other, or no small model can be made, the run ends before the model is loaded:

```
error: packed documents would see each other: 'rwkv' models of transformers {version} do not keep them apart (...);
set data.packing=false, or for pretraining data.isolate_documents=false
```

## Prove it for your model

```
python launch/verify.py FOLDER_OR_HUB_NAME
python launch/verify.py --config ds_configs/recipes/sft.yaml model.path=FOLDER_OR_HUB_NAME
```

prints a table of proofs. The model itself is not loaded, and no weights are needed: a folder with `config.json` is
enough, and the tokenizer's files for the last row. A small model of the same configuration is made as above. Every row
compares what a run does with plain torch and the library's own forward pass:

```
models/llama: a small 'llama' model with random weights, on the CPU in fp32
holds   packed documents = each alone          attention document by document; to 6e-07
holds   kernels on = off                       loss head; kernels in use: 2 rope; to 8e-07
holds   recomputed layers on = off             2 layers computed again, packed rows
holds   saved, loaded: same logits             written as a run writes it
holds   generation with a cache = without      6 greedy tokens behind 3 prompts; to 6e-07
holds   left padding = none                    prompts of (13, 8, 3) tokens in one batch; to 5e-07
holds   scores = plain loop                    entropy and log-probability of 5 samples in one batch; to 9e-08
holds   ZeRO 0 on two processes = plain torch  losses and weights after 3 steps; to 9e-07
holds   ZeRO 1 on two processes = plain torch  losses and weights after 3 steps; to 9e-07
holds   ZeRO 2 on two processes = plain torch  losses and weights after 3 steps; to 9e-07
holds   ZeRO 3 on two processes = plain torch  losses and weights after 3 steps; to 9e-07
refused experts on two processes = on one      parallel.expert: a 'llama' model of this configuration has no experts
holds   rows on two processes = on one         losses and weights after 3 steps; to 9e-07
holds   chat: only answers are trained         22 of 87 tokens are trained
── a sample conversation: 87 tokens, 22 trained
<|im_start|>user
Which planet is the largest?<|im_end|>
<|im_start|>assistant
⟦Jupiter is the largest planet.<|im_end|>⟧
<|im_start|>user
And the smallest one?<|im_end|>
<|im_start|>assistant
⟦Mercury, by far.<|im_end|>⟧

13 hold, 1 refused, 0 broken
```

- `holds`: both are equal, to what rounding changes. The figure is the largest difference, relative to the
  largest value; of trained weights, relative to how far they moved.
- `refused`: the model does not have this, and a run says so before its first step, for the same reason.
- `broken`: the two differ, and by how much, or an error ended the check. Do not train this model in this way.

Part of a conversation that is trained stands in ⟦ ⟧, or is green on a terminal. `--json table.json` also writes the
rows. The exit code is 1 where a row is broken, and 2 for a wrong name or configuration. Of a run's configuration the
model, `model.attention`, `data.tokenizer` and `data.train_on` count.

Everything runs on the CPU in fp32, where the project's kernels compute in plain torch: [GPU check](gpu_check.md) is for
those of a GPU. What depends on a model's size or on its trained weights is not shown.

Four of the architectures below generate wrongly in transformers {version}, and a row is broken. `nemotron_h`
and `zamba2` do not bound the time step of a layer where they go on from a cache: generate with `--no-use-cache`.
`recurrent_gemma` and `rwkv` mix padding into their states: generate with `--batch-size 1`.

## How documents are kept apart

The first of these ways that passes the check is taken.

1. **Attention document by document.** Nothing is computed between documents. On a CPU this is torch's attention for
   each document, with sliding windows, soft caps and sinks. On a GPU in 16 bits it is flash-attn where that is
   installed, else torch's variable-length attention, which has no soft caps and sinks.
2. **Attention under a mask** that holds the documents. It costs the square of the row.

Layers that mix tokens by other means (linear attention, state-space layers, convolutions) take no mask. The check
finds them by changing one document and looking which modules change another. Each of them then gets every document as
a row of its own, padded to less than twice its tokens. ZeRO-3 gathers such a layer as one, so ranks with different
documents do not wait for each other.

`model.attention=eager` always takes the mask. Parameters and saved files do not change.

## {count} architectures of transformers {version}

Each is compared in the tests with the library's own logits of each document alone: losses and all gradients, with and
without recomputed layers (`tests/models/test_isolation.py`), four of them under ZeRO 1 to 3 on two processes
(`tests/multirank/test_isolation.py`).

Attention document by document:

{plain}

Attention document by document or under a mask, and the named layers document by document:

{mixed}

Attention under a mask:

{masked}

Refused, because no way passes the check: {refused}.

No GPU has run these tests: on one the check itself runs there, in the type of the run.

## Experts

A layer's experts are recognised by what their module holds, not by the name of the model: one 3-D weight for each
projection, in the order that transformers' common interface of experts says, with or without gates and biases. They
then run as grouped products and the project's movement of tokens ([kernels](kernels.md)), outputs and gradients equal
to the library's (`tests/models/test_expert_modules.py`):

{fused}

`parallel.expert` divides the experts of all of these among processes ([parallelism](parallelism.md)), but for
{unshared}, whose experts have biases or no gates. A run says so before it loads the model. {other} hold
their experts in another way: they keep the library's forward pass and are not divided.

## Rows

`parallel.sequence` shares rows between processes in the project's decoder and in {count_rows} families. Losses,
auxiliary losses and gradients on two processes are compared with those of whole rows
(`tests/multirank/test_rows.py`):

{rows}

On a GPU `gpt_oss` does not, and models with soft caps need flash-attn. A run says so before it loads the model.
"""


if __name__ == "__main__":
    print(markdown(), end="")
