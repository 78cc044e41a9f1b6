"""transformers 5.17 to 5.24: names outside its top-level interface, and class names of its models.

`NAMES`: each such name, the module it lies in and what it is for. Models are built with `ds_llm.compat.hf_model`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from ds_llm.compat.names import lookup

NAMES = {
    # configurations and models
    "CONFIG_MAPPING": ("transformers.models.auto.configuration_auto", "configuration class of a `model_type`"),
    "MODEL_MAPPING": ("transformers.models.auto.modeling_auto", "backbone class of a configuration class"),
    "MODEL_FOR_CAUSAL_LM_MAPPING": (
        "transformers.models.auto.modeling_auto",
        "language model class of a configuration class",
    ),
    "ModelOutput": ("transformers.modeling_outputs", "base of our models' outputs"),
    "CausalLMOutputWithPast": ("transformers.modeling_outputs", "output of the boosted model"),
    "GradientCheckpointingLayer": ("transformers.modeling_layers", "base of the decoder's layers"),
    "Cache": ("transformers.cache_utils", "type of the key-value cache"),
    "initialization": ("transformers", "fills weights unless a file has given them"),
    "can_return_tuple": ("transformers.utils", "serves `return_dict=False`"),
    "capture_outputs": ("transformers.utils.output_capturing", "collects what layers return, on request"),
    "OutputRecorder": ("transformers.utils.output_capturing", "says which layers give which output"),
    "Conv1D": ("transformers.pytorch_utils", "GPT-2's linear layers, which pruning and Muon treat as such"),
    "find_adapter_config_file": ("transformers.utils.peft_utils", "finds an adapter's configuration on the hub"),
    "cached_file": ("transformers.utils.hub", "finds a file of a model on the hub or in its cache"),
    "get_checkpoint_shard_files": ("transformers.utils.hub", "finds the weight files that an index names"),
    # attention
    "ALL_ATTENTION_FUNCTIONS": ("transformers.modeling_utils", "attention kernel of a name"),
    "AttentionMaskInterface": ("transformers.masking_utils", "says which mask our attention kernels get"),
    "ALL_MASK_ATTENTION_FUNCTIONS": ("transformers.masking_utils", "makes the mask of an attention kernel"),
    "and_masks": ("transformers.masking_utils", "joins conditions of a mask"),
    "causal_mask_function": ("transformers.masking_utils", "condition of a causal mask"),
    "create_sliding_window_causal_mask": ("transformers.masking_utils", "the same within a window"),
    "ROPE_INIT_FUNCTIONS": ("transformers.modeling_rope_utils", "scaled rotary frequencies of a configuration"),
    "create_causal_mask": ("transformers.masking_utils", "causal mask, block-diagonal for packed documents"),
    "eager_attention_forward": ("transformers.models.llama.modeling_llama", "attention that returns its weights"),
    "is_flash_attn_2_available": ("transformers.utils", "whether flash-attn can be used"),
    "load_balancing_loss_func": ("transformers.models.mixtral.modeling_mixtral", "balance loss of models with experts"),
    # generation and chats
    "NoRepeatNGramLogitsProcessor": ("transformers.generation.logits_process", "bans repeated n-grams"),
    "RepetitionPenaltyLogitsProcessor": ("transformers.generation.logits_process", "penalises repeated tokens"),
    "render_jinja_template": ("transformers.utils.chat_template_utils", "renders chats, with the assistant's spans"),
    "_compile_jinja_template": ("transformers.utils.chat_template_utils", "parses a chat template as it is rendered"),
    # output on the terminal
    "disable_progress_bar": ("transformers.utils.logging", "hides the bars of loading"),
    "enable_progress_bar": ("transformers.utils.logging", "shows them again"),
    "is_progress_bar_enabled": ("transformers.utils.logging", "whether they were shown"),
}
# Blocks whose experts run on the tokens routed to them; the project's own is MoEBlock.
MOE_BLOCKS = (
    "MoEBlock",
    "MixtralSparseMoeBlock",
    "OlmoeSparseMoeBlock",
    "Qwen2MoeSparseMoeBlock",
    "Qwen3MoeSparseMoeBlock",
)
# class names by file of transformers.models; other files of the same layout differ in what surrounds the rotation
ATTENTION = {
    "llama": "LlamaAttention",
    "qwen2": "Qwen2Attention",
    "qwen3": "Qwen3Attention",
    "qwen3_moe": "Qwen3MoeAttention",
    "mixtral": "MixtralAttention",
    "olmoe": "OlmoeAttention",
}
ROUTERS = {"qwen3_moe": "Qwen3MoeTopKRouter", "mixtral": "MixtralTopKRouter", "olmoe": "OlmoeTopKRouter"}


def chosen_attention(config) -> str | None:
    """Name of the attention kernel that a model of this configuration uses, None where none was chosen."""
    return getattr(config, "_attn_implementation", None)


def choose_attention(config, name: str | None) -> None:
    """Have models built from this configuration use the attention kernel of a name."""
    config._attn_implementation = name


def recompute_inside(model, contexts) -> None:
    """Have layers that a model computes again in the backward pass do so inside a context; `contexts()` gives one for
    the forward pass and one for its repetition. Raises ValueError for reentrant recomputation, which has none."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is None or not getattr(module, "gradient_checkpointing", False):
            continue
        settings = getattr(function, "keywords", {})
        if settings.get("use_reentrant", True):
            raise ValueError('packed documents need gradient_checkpointing_enable({"use_reentrant": False})')
        if settings.get("context_fn") is not contexts:
            module._gradient_checkpointing_func = partial(function, context_fn=contexts)


def supported_kernels(model) -> dict[str, bool]:
    """Which of the attention kernels `flash_attention_2` and `sdpa` a model or model class says it can use."""
    return {
        "flash_attention_2": getattr(model, "_supports_flash_attn", False),
        "sdpa": getattr(model, "_supports_sdpa", False),
    }


def experts_kernel(config) -> str | None:
    """Name of the experts' implementation that was asked for, None where none was."""
    return getattr(config, "_experts_implementation", None)


def without_renaming(function):
    """The function inside decorators of transformers that only rename arguments, as 5.24 put them around attention."""
    while getattr(function, "__code__", None) and function.__code__.co_filename.endswith("/utils/deprecation.py"):
        function = function.__wrapped__
    return function


@contextlib.contextmanager
def watch_first_weights(watch: Callable[[Callable, object, Callable[[], None]], None]) -> Iterator[None]:
    """While the block runs, models that are built set the first weights of each module through `watch`.

    watch: (function that sets the weights of a module, the module, a call of it as the model makes it) -> None.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel._initialize_weights

    def watched(self, module, *args, **kwargs):
        watch(self._init_weights, module, lambda: original(self, module, *args, **kwargs))

    PreTrainedModel._initialize_weights = watched
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = original


def save_on_this_rank(model, folder, weights: dict, largest: int) -> None:
    """`save_pretrained` of some of a model's weights, on whatever rank it is called; by itself only rank 0 writes.

    largest: bytes of a file. Its progress bar stays hidden.
    """
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.should_save_on_this_rank = lambda _: True
    try:
        model.save_pretrained(folder, state_dict=weights, max_shard_size=largest)
    finally:
        del model.should_save_on_this_rank
        if bars:
            logging.enable_progress_bar()


def has_usual_gate(experts) -> bool:
    """Whether a module of experts activates the gate projection and multiplies it with the up projection."""
    return getattr(getattr(type(experts), "_apply_gate", None), "__name__", "") == "_default_apply_gate"


def apply_gate(experts):
    """The method of a module of experts that joins gate and up projections, None where it has none."""
    return getattr(experts, "_apply_gate", None)


__getattr__ = lookup("transformers", NAMES)
