"""A small model of a configuration: few layers of each kind, narrow, with random weights.

A check that does not depend on size holds for the configuration if it holds for the small model.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ds_llm.errors import UserError

# names of whole numbers in configurations, of which a narrow model has less
WIDTHS = re.compile(r"(^|_)(hidden_size|n_embd|d_model|lru_width|mamba_d_ssm|word_embed_proj_dim|embedding_size|^dim)$")
INNER = re.compile(r"(^|_)(.*intermediate.*size|.*ffn_dim|ffn_hidden_size|n_inner|d_ff|hidden_dim|shared_expert_.*size"
                   r"|moe_.*size)$")  # fmt: skip
HEADS = re.compile(r"(^|_)((n|num)_.*heads?|n_head|num_heads|n_groups)$")
EXPERTS = re.compile(r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts)$")
CHOSEN = re.compile(r"^(num_experts_per_tok|num_experts_per_token|top_k|moe_k|moe_topk)$")
WINDOWS = re.compile(r"(^|_)(sliding_window|attention_window_size|window_size|local_attention|attention_chunk_size)$")
VOCABULARIES = re.compile(r"^vocab_size")
POSITIONS = re.compile(r"^(max_position_embeddings|n_positions|n_ctx)$")
CHUNKS = re.compile(r"^(mamba_)?chunk_size$")  # of a state-space layer's sums: their length does not change them
DROPOUT = re.compile(r"drop|pdrop|jitter")
NARROW = 64  # values per token
LONGEST_WINDOW = 4  # tokens
LONGEST_CHUNK = 16
VOCABULARY = 128
FEWEST_POSITIONS = 64
LARGEST = 200_000_000  # parameters of a small model


def small_configs(config: PreTrainedConfig, keep_heads: bool = False) -> Iterator[PreTrainedConfig]:
    """Configurations of small models of a configuration, the smallest first, for `small_model`.

    keep_heads: with heads as wide as those of the configuration. Raises `UserError` where none can be built.
    """
    problem, seen = None, []
    levels = [("narrow", True), ("whole heads", True), ("whole heads", False), ("wide", True), ("wide", False)]
    for width, shallow in levels[keep_heads:]:
        try:
            small = cut(config, width, shallow)
            if (values := small.to_dict()) in seen:
                continue
            with torch.device("meta"):
                size = sum(p.numel() for p in _build(small, "eager").parameters())
        except Exception as error:  # whatever a configuration makes of numbers that do not fit together
            problem = (str(error).strip() or type(error).__name__).splitlines()[0]
            continue
        if size > LARGEST:
            problem = problem or f"its smallest form has {size / 1e9:.1f}B parameters"
            continue
        seen.append(values)
        yield small
    if not seen:
        raise UserError(f"no small '{config.model_type}' model can be built: {problem}")


def small_model(
    config: PreTrainedConfig, attention: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A model of a small configuration with an attention kernel and random weights."""
    model = _build(copy.deepcopy(config), attention)
    randomize(model)
    return model.to(device, dtype)


def cut(config: PreTrainedConfig, width: str = "narrow", shallow: bool = True) -> PreTrainedConfig:
    """The configuration of a small model: a small vocabulary, short windows, few experts, nothing random.

    width: "narrow", with heads that may be narrower too, "whole heads", which are as wide, or "wide", as it is.
    shallow: with the first layers, at least two, that show every kind of layer.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    values = vars(text)
    if width != "wide":
        _make_narrow(values, width == "whole heads")
        _keep_few_experts(values)
    if shallow:
        _keep_first_layers(text)
    values.update({name: min(value, LONGEST_WINDOW) for name, value in _whole_numbers(values, WINDOWS).items()})
    values.update({name: min(value, LONGEST_CHUNK) for name, value in _whole_numbers(values, CHUNKS).items()})
    values.update({n: 0.0 for n, v in values.items() if DROPOUT.search(n) and isinstance(v, float)})
    values.update(dict.fromkeys(_whole_numbers(values, VOCABULARIES), VOCABULARY))
    values.update({name: max(value, FEWEST_POSITIONS) for name, value in _whole_numbers(values, POSITIONS).items()})
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if values.get(name) is not None:
            values[name] = 1
    if getattr(small, "trash_expert", None) == "noise":
        small.trash_expert = "zero"
    return small


def _make_narrow(values: dict, keep_heads: bool) -> None:
    """Fewer heads and values per token: all by one factor, or as few as the ratio of the counts of heads allows."""
    widths, inner, heads = (_whole_numbers(values, names) for names in (WIDTHS, INNER, HEADS))
    heads = {name: count for name, count in heads.items() if count > 1}
    if keep_heads:
        numbers = [*heads.values(), *widths.values(), *inner.values()]
        factor = next(f for f in range(64, 0, -1) if all(n % f == 0 for n in numbers) and _wide_enough(widths, f))
        values.update({name: n // factor for name, n in (widths | inner | heads).items()})
        return
    fewest = min(heads.values(), default=1)
    values.update({name: 4 if count >= 2 * fewest else 2 for name, count in heads.items()})
    largest = max(widths.values())
    factor = largest // NARROW if largest % NARROW == 0 else largest // math.gcd(largest, 3 * NARROW)
    values.update({name: max(n // factor, 1) for name, n in widths.items()})
    values.update({name: min(n, NARROW) for name, n in inner.items()})


def _wide_enough(widths: dict[str, int], factor: int) -> bool:
    return factor == 1 or all(n // factor >= NARROW // 2 for n in widths.values())


def _keep_few_experts(values: dict) -> None:
    groups = values.get("n_group") or values.get("num_expert_group") or 1
    for name, value in _whole_numbers(values, EXPERTS).items():
        values[name] = min(value, 2 * groups if groups > 1 else 8)
    for name, value in _whole_numbers(values, CHOSEN).items():
        values[name] = min(value, 2)
    if values.get("first_k_dense_replace"):
        values["first_k_dense_replace"] = 1


def _whole_numbers(values: dict, names: re.Pattern) -> dict[str, int]:
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int) and not isinstance(value, bool) and value > 0 and names.search(name)
    }


def _keep_first_layers(text: PreTrainedConfig) -> None:
    count, values = text.num_hidden_layers, vars(text)
    kinds = next(
        (
            value[:count]
            for name in ("layer_types", "layers_block_type")
            if isinstance(value := getattr(text, name, None), (list, tuple)) and len(value) >= count
        ),
        [None] * count,
    )
    kept = max(min(2, count), next(n for n in range(1, count + 1) if set(kinds[:n]) == set(kinds)))
    times = 1
    if values.get("num_kv_shared_layers"):  # the last ones take keys and values of those before
        values["num_kv_shared_layers"], times = kept, 2
    for name, value in values.items():
        if isinstance(value, (list, tuple)) and len(value) == count:
            values[name] = value[:kept] * times
    for name in (text.attribute_map.get("num_hidden_layers", "num_hidden_layers"), "num_layers"):
        if name in values:
            values[name] = kept * times


def _build(config: PreTrainedConfig, attention: str) -> nn.Module:
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)


@torch.no_grad()
def randomize(model: nn.Module, scale: float = 1.0) -> None:
    """Draw weights with which every visible token changes a token's output. The usual initial weights are too small.

    scale: factor on the matrices, relative to the one that keeps the size of activations.
    """
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif parameter.is_floating_point():
            parameter.copy_(torch.randn_like(parameter) * scale * max(parameter[0].numel(), 1) ** -0.5)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
