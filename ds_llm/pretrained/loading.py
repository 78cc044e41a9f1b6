"""Loads causal language models and their tokenizers from any name that `ds_llm.pretrained.source` knows.

Adapters are merged into their base model. Boosted models (`ds_llm.models.boost`) are recognised by their files. Every
mistake of a user is a `UserError`.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import pickle
import re
import sys
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

import ds_llm.models.decoder
import ds_llm.models.select_moe  # noqa: F401 (they register the project's models with the Auto classes)
from ds_llm.compat.transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    disable_progress_bar,
    enable_progress_bar,
    is_flash_attn_2_available,
    is_progress_bar_enabled,
    supported_kernels,
)
from ds_llm.config.sections import DTYPES
from ds_llm.data.tokenizer import load_tokenizer as read_tokenizer
from ds_llm.distributed.environment import rank
from ds_llm.errors import UserError
from ds_llm.models.boost import QwenBoostConfig, sub_config
from ds_llm.models.deferred import settle, settle_mapped
from ds_llm.pretrained import partial
from ds_llm.pretrained.added_tokens import ends, grow
from ds_llm.pretrained.merging import merge_when_read
from ds_llm.pretrained.source import PARTIAL_FILE, Source, check_index, detect_model_type, did_you_mean, locate, nearest
from ds_llm.pretrained.weight_files import mapped
from ds_llm.sparsity import compact_checkpoint

TORCH_DTYPES = dict(zip(DTYPES, (torch.float32, torch.bfloat16, torch.float16), strict=True))
ATTENTION = ("auto", "sdpa", "flash_attention_2", "eager")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_model_config(path: str | os.PathLike):
    """The transformers configuration of a causal language model; for an adapter, that of its base model.

    A configuration that looks boosted but cannot be read as such is read as a standard one, with a warning on standard
    error. Raises `UserError` where there is no model, or none with a known causal architecture.
    """
    source = locate(path)
    if source.adapter:
        return load_model_config(source.base())
    if source.gguf:
        need("gguf", "accelerate", what=f"{path}: reading a GGUF file")
    elif detect_model_type(path) == "qwen_boost":
        try:
            return QwenBoostConfig.from_pretrained(source.name)
        except (StrictDataclassError, ValueError, TypeError) as error:
            if not _is_also_standard(source):
                raise _config_error(source, error) from None
            _note_fallback(source, error)
    return _standard_config(source)


def architectures(path: str | os.PathLike) -> list:
    """The transformers configurations that a causal language model is made of: its own, or those of its sub-models."""
    config = load_model_config(path)
    return [sub_config(values) for values in config.sub_model_cfgs] if isinstance(config, QwenBoostConfig) else [config]


def _standard_config(source: Source):
    try:
        extra = {"gguf_file": source.gguf} if source.gguf else {}
        config = AutoConfig.from_pretrained(source.name, trust_remote_code=False, **extra)
    except Exception as error:  # errors of JSON and of strict configurations: all are about the user's files
        raise _config_error(source, error) from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{source.name}: a '{config.model_type}' model is not a causal language model")
    return config


def _is_also_standard(source: Source) -> bool:
    """Whether a configuration that looks boosted also names a standard architecture, as earlier programs wrote it."""
    values, _ = PreTrainedConfig.get_config_dict(source.name)
    return values.get("model_type") in CONFIG_MAPPING and values["model_type"] != QwenBoostConfig.model_type


def _note_fallback(source: Source, error: Exception) -> None:
    _note(f"{source.name}: seems to be a boosted model but cannot be loaded as one ({_reason(error)}); "
          "loading it as a standard model")  # fmt: skip


def _config_error(source: Source, error: Exception) -> UserError:
    file = Path(source.name) / "config.json"
    if source.gguf:
        return UserError(f"{Path(source.name) / source.gguf}: cannot be read as GGUF ({_reason(error)})")
    if not Path(source.name).is_dir():
        near = nearest(Path(source.name)) if Path(source.name).parent.is_dir() else ""
        return UserError(
            f"{source.name}: no such folder, and no model of this name could be had from the hub "
            f"({_reason(error)}){near}"
        )
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as broken:
        return UserError(f"{file}: cannot be read ({_reason(broken)})")
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind is None:
        return UserError(f"{file}: names no model_type, so its architecture is unknown")
    if kind not in CONFIG_MAPPING and "auto_map" in values:
        return UserError(f"{file}: model_type '{kind}' is code that comes with the model, which is never run")
    if kind not in CONFIG_MAPPING:
        close = difflib.get_close_matches(kind, list(CONFIG_MAPPING.keys()), n=1)
        hint = did_you_mean(close)
        return UserError(f"{file}: model_type '{kind}' is not known to this version of transformers{hint}")
    return UserError(f"{file}: {_reason(error)}")


def load_tokenizer(path: str | os.PathLike):
    """The tokenizer of a model or of a tokenizer folder, always with a padding token.

    A tokenizer without one uses its end-of-text token for padding, or else its unknown token, with a note on standard
    error; the vocabulary never grows. An adapter without a tokenizer uses that of its base model.
    """
    folder = Path(os.path.expanduser(str(path)))
    if folder.is_dir() and any((folder / name).is_file() for name in TOKENIZER_FILES):
        source = Source(str(folder))
    else:
        source = locate(path)
        if source.adapter and not any((Path(source.name) / name).is_file() for name in TOKENIZER_FILES):
            return load_tokenizer(source.base())
    if source.gguf:
        need("gguf", what=f"{path}: reading a GGUF file")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.name, gguf_file=source.gguf, trust_remote_code=False)
        except Exception as error:  # of gguf, tokenizers (a bare Exception) and transformers: all are about this file
            raise UserError(f"{path}: its tokenizer cannot be read ({_reason(error)})") from None
    else:
        tokenizer = read_tokenizer(source.name)
    return ensure_padding(tokenizer)


def ensure_padding(tokenizer):
    """The tokenizer, with its end-of-text or unknown token for padding where it has no padding token."""
    if tokenizer.pad_token is None:
        name, token = tokenizer.name_or_path or "this model", tokenizer.eos_token or tokenizer.unk_token
        if token is None:
            raise UserError(f"{name}: the tokenizer has no padding, end-of-text or unknown token; set its pad_token")
        tokenizer.pad_token = token
        _note(f"the tokenizer of {name} has no padding token: {token!r} serves, and is masked where it pads")
    return tokenizer


def attention_kernel(attention: str, dtype: str) -> str:
    """The transformers attention implementation for `auto`, `sdpa`, `flash_attention_2` or `eager`.

    `auto` takes flash-attn for a 16-bit `dtype` on a GPU where it is installed, else SDPA.
    """
    if attention not in ATTENTION:
        close = difflib.get_close_matches(str(attention), ATTENTION, n=1)
        raise UserError(f"attention '{attention}': must be {', '.join(ATTENTION)}{did_you_mean(close)}")
    usable = torch.cuda.is_available() and is_flash_attn_2_available()
    if attention == "auto":
        return "flash_attention_2" if usable and dtype in ("bf16", "fp16") else "sdpa"
    if attention == "flash_attention_2":
        if not usable:
            raise UserError("attention flash_attention_2: needs a GPU and the package flash-attn; use sdpa or auto")
        if dtype not in ("bf16", "fp16"):
            raise UserError(f"attention flash_attention_2: computes in bf16 or fp16, not {dtype}; use sdpa or auto")
    return attention


def load_model(
    path: str | os.PathLike,
    dtype: str = "auto",
    attention: str = "auto",
    compute_dtype: str | None = None,
    merge: bool = True,
    quantize: str = "none",
    deferred: bool = False,
) -> torch.nn.Module:
    """A causal language model with its weights, on the CPU, in evaluation mode.

    dtype: fp32, bf16, fp16, or auto for the dtype it was saved in. attention: see `attention_kernel`. compute_dtype:
    the dtype of the forward pass, if another. quantize: "nf4" holds all linear layers but the output head in 4 bits, on
    this process's GPU where there is one (needs bitsandbytes). deferred: weights in safetensors files are not read yet
    (`ds_llm.models.deferred`); those that are neither cast nor joined are views of the mapped files.

    The trained part of a model is loaded onto its base. A peft adapter is merged into its base; with merge=False the
    result is a peft model instead. A folder that looks like a boosted model but is none is loaded as a standard model,
    with a warning on standard error. Raises `UserError` for files that are missing, damaged or do not fit: no weight is
    left at random values.
    """
    source = locate(path)
    if source.adapter:
        if quantize != "none":
            raise UserError(f"{source.name}: is an adapter; merge it first (launch/export.py) to quantise the result")
        return _load_adapter(source, dtype, attention, compute_dtype, merge, deferred)
    config = load_model_config(path)
    options = (dtype, attention, compute_dtype, quantize, deferred)
    try:
        return _load(source, config, *options)
    except UserError as error:
        if not isinstance(config, QwenBoostConfig) or not _is_also_standard(source):
            raise
        _note_fallback(source, error)
        return _load(source, _standard_config(source), *options)


def _load(source: Source, config, dtype: str, attention: str, compute_dtype: str | None, quantize: str, deferred: bool):
    if dtype == "auto":
        stored = {value: name for name, value in TORCH_DTYPES.items()}
        dtype = stored.get(config.dtype or config.get_text_config().dtype, "fp32")
    if dtype not in TORCH_DTYPES:
        raise UserError(f"dtype '{dtype}': must be auto, {', '.join(TORCH_DTYPES)}")
    kernel = supported_attention(config, attention, attention_kernel(attention, compute_dtype or dtype))
    extra = {"config": config}
    if quantize == "nf4":
        extra["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=TORCH_DTYPES[compute_dtype or dtype],
        )
        if torch.cuda.is_available():
            extra["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    if compact_checkpoint.is_compact(source.name):
        if quantize != "none":
            raise UserError(f"{source.name}: is a sparse model; write it dense first (launch/export.py) to quantise it")
        extra["state_dict"] = compact_checkpoint.load_dense(source.name, TORCH_DTYPES[dtype], deferred)
    if source.gguf:
        extra = {"gguf_file": source.gguf}
        if hasattr(transformers, "GgufConfig"):  # releases that have it may keep weights packed, untrainable
            extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    check_index(Path(source.name))
    if deferred and quantize == "none" and not source.gguf and "state_dict" not in extra:
        tensors = mapped(source.name)
        extra |= {} if tensors is None else {"state_dict": tensors}
    try:
        with _bars():
            loader, place = AutoModelForCausalLM, source.name
            if "state_dict" in extra:
                loader, place = _model_class(config), None
            model, found = loader.from_pretrained(
                place,
                dtype=TORCH_DTYPES[dtype],
                attn_implementation=kernel,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
                trust_remote_code=False,
                **extra,
            )
        if "state_dict" in extra:  # what it sets itself where it is given a place
            model.name_or_path = model.config.name_or_path = source.name
            with contextlib.suppress(OSError):  # there is no such file
                model.generation_config = transformers.GenerationConfig.from_pretrained(source.name)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{source.name}: the weights cannot be loaded ({_reason(error)})") from None
    except pickle.UnpicklingError as error:
        raise _no_weights(source, error) from None
    except SafetensorError as error:
        raise UserError(f"{source.name}: a weight file is damaged or incomplete ({_reason(error)})") from None
    _check_weights(source.name, found)
    settle_mapped(model)
    if quantize == "nf4":
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # an evaluation would repack the weights for a product through which no gradient flows any more
                module.support_avx512bf16_for_cpu = False
    if source.gguf:
        # its weights are plain by now; save_pretrained and training refuse a model with these marks
        model.config.__dict__.pop("quantization_config", None)
        for name in ("is_quantized", "quantization_method", "hf_quantizer"):
            model.__dict__.pop(name, None)
    return model


@contextlib.contextmanager
def _bars():
    """Show the library's loading bar on a terminal only, and on one rank."""
    shown = is_progress_bar_enabled()
    if shown and (rank() or not sys.stderr.isatty()):
        disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def _model_class(config) -> type:
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model[0] if isinstance(model, tuple) else model


def supported_attention(config, asked: str, kernel: str) -> str:
    """The kernel, or for `auto` the best one the architecture of a transformers configuration has."""
    model = _model_class(config)
    has = supported_kernels(model) | {"eager": True}
    if asked != "auto":
        if not has[kernel]:
            raise UserError(f"attention {kernel}: a '{config.model_type}' model does not have it; use auto or eager")
        return kernel
    order = list(has)
    return next(name for name in order[order.index(kernel) :] if has[name])


def _check_weights(name: str, found: dict) -> None:
    for what, keys in (("lacks", found["missing_keys"]), ("has another shape for", found.get("mismatched_keys", ()))):
        if keys:
            names = sorted(key if isinstance(key, str) else key[0] for key in keys)
            raise UserError(f"{name}: the weight file {what} {len(names)} of the model's tensors, first {names[0]}")
    unused = sorted(found["unexpected_keys"])
    if unused:
        _note(f"{name}: {len(unused)} tensors of the weight file belong to no part of the model, first {unused[0]}")


def _load_adapter(
    source: Source, dtype: str, attention: str, compute_dtype: str | None, merge: bool, deferred: bool
) -> torch.nn.Module:
    if Path(source.adapter).name == PARTIAL_FILE:
        base = load_model(source.base(), dtype, attention, compute_dtype, deferred=deferred)
        return partial.load(base, Path(source.name), source.base())
    need("peft", what=f"{source.name}: loading an adapter")
    from peft import PeftConfig, PeftModel

    name = source.base()
    settings = PeftConfig.from_pretrained(source.name)
    if settings.is_prompt_learning:
        raise UserError(f"{source.name}: a {settings.peft_type.value} adapter has no weights to merge; use LoRA")
    deferred = deferred and not getattr(settings, "use_dora", False)  # whose adapters begin as norms of the weights
    base = load_model(name, dtype, attention, compute_dtype, deferred=deferred)
    settle(base, only=ends(base))  # an adapter of an embedding has the embedding in its file
    if settings.modules_to_save:  # a run that added tokens saves the embeddings with its adapters
        grow(base, load_tokenizer(source.name))
    try:
        model = PeftModel.from_pretrained(base, source.name)
        if merge and deferred:
            merge_when_read(model)
        return model.merge_and_unload() if merge else model
    except pickle.UnpicklingError as error:
        raise _no_weights(source, error) from None
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{source.name}: does not fit its base model {name} ({_reason(error)})") from None


def _no_weights(source: Source, error: pickle.UnpicklingError) -> UserError:
    """The error for a file in torch's format with other content than tensors, of which torch.load runs nothing."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    what = f"names the program {named[1]}, which was not run" if named else "is damaged"
    return UserError(f"{source.name}: a weight file {what}; use safetensors")


def match_tokenizer(model: torch.nn.Module, tokenizer) -> None:
    """Set the tokenizer's padding token in the model's configurations.

    Raises `UserError` where the tokenizer has more ids than the model's embedding.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {rows}: they do not belong together"
        )
    for config in (model.config.get_text_config(), model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id


def need(*packages: str, what: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(f"{what} needs a package that is not installed; run: pip install {' '.join(missing)}")


def _note(message: str) -> None:
    if rank() == 0:
        print(f"note: {message}", file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # says which value is wrong; the error itself says which check found it
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")
