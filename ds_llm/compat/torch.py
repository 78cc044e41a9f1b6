"""torch 2.11 to 2.13: private names, and those outside its documented interface.

`NAMES`: each such name, the module it lies in and what it is for.
"""

from __future__ import annotations

import inspect

import torch

from ds_llm.compat.names import lookup

NAMES = {
    "_flatten_dense_tensors": ("torch._utils", "one tensor of several, as DeepSpeed's optimizers lay them"),
    "_unflatten_dense_tensors": ("torch._utils", "the views back"),
    "FakeTensor": ("torch._subclasses", "tells a model that is only planned from one with weights"),
    "FakeTensorMode": ("torch._subclasses.fake_tensor", "runs a model that is only planned"),
    "TorchDispatchMode": (
        "torch.utils._python_dispatch",
        "sees every operation: of a planned pass, of first weights",
    ),
    "tree_flatten": ("torch.utils._pytree", "tensors in nested arguments, for pruning block by block"),
    "tree_leaves": ("torch.utils._pytree", "tensors in nested results, for the memory planner"),
    "tree_map": ("torch.utils._pytree", "changes tensors in nested arguments"),
    "tree_map_only": ("torch.utils._pytree", "moves tensors in nested arguments"),
    "cpp_extension": ("torch.utils", "compiles and loads extensions"),
    "FileBaton": ("torch.utils.file_baton", "its lock of an extension that is being compiled"),
    "_get_build_directory": ("torch.utils.cpp_extension", "where an extension is compiled"),
    "JIT_EXTENSION_VERSIONER": ("torch.utils.cpp_extension", "which extensions this process takes as built"),
    "adamw": ("torch.optim.adamw", "AdamW's step as a function: the reference of our masked one"),
}


CAST = torch.ops.aten._to_copy.default  # the operation behind `Tensor.to`


class ValuelessTensor(torch.Tensor):
    """Base of tensors with shape, strides and dtype but no memory. `__torch_dispatch__` of a subclass sees operations.

    outline: a tensor with that shape, strides and dtype.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, outline: torch.Tensor, *_):
        return torch.Tensor._make_wrapper_subclass(
            cls, outline.shape, strides=outline.stride(), dtype=outline.dtype, device="cpu"
        )


def variable_length_attention(query, key, value, bounds, longest: int, scale: float | None, window: int | None):
    """Causal attention of documents laid end to end, on a GPU in 16 bits, by whichever arguments this torch has for it.

    query [T, heads, D], key and value [T, key heads, D]; bounds int32 [documents + 1]; longest: tokens of a document;
    window: so many tokens, its own among them, a token sees. Raises ValueError for what this torch does not have.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options = {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise ValueError("this torch has no variable-length attention with a window")
    if scale is not None and "scale" not in known:
        raise ValueError("this torch has no variable-length attention with a scale")
    if scale is not None:
        options["scale"] = scale
    if query.shape[1] != key.shape[1] and "enable_gqa" in known:
        options["enable_gqa"] = True
    elif query.shape[1] != key.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)


def set_buffer(module, name: str, value) -> None:
    """Replace a buffer, which keeps whether it is persistent."""
    module._buffers[name] = value


def replace_tensors(module, replacement) -> None:
    """Put `replacement(tensor)` in the place of each parameter and buffer of a module itself."""
    for tensors in (module._parameters, module._buffers):
        for name, old in tensors.items():
            if old is not None:
                tensors[name] = replacement(old)


def swap_parameter(module, name: str, parameter):
    """Put a parameter in the place of one of a module itself, whatever its shape; returns the old one."""
    old, module._parameters[name] = module._parameters[name], parameter
    return old


def remove_parameter(module, name: str) -> None:
    """Take a parameter out of a module, so that its class may define a property of the same name."""
    del module._parameters[name]


def forget_build(name: str) -> None:
    """Have this process run the build of an extension again at its next load, which it skips after the first one."""
    from torch.utils.cpp_extension import JIT_EXTENSION_VERSIONER

    JIT_EXTENSION_VERSIONER.entries.pop(name, None)


__getattr__ = lookup("torch", NAMES)
