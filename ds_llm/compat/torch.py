"""torch 2.11 to 2.13: private names, and those outside its documented interface.

`NAMES`: each such name, the module it lies in and what it is for.
"""

from __future__ import annotations

from ds_llm.compat.names import lookup

NAMES = {
    "_flatten_dense_tensors": ("torch._utils", "one tensor of several, as DeepSpeed's optimizers lay them"),
    "_unflatten_dense_tensors": ("torch._utils", "the views back"),
    "FakeTensor": ("torch._subclasses", "tells a model that is only planned from one with weights"),
    "FakeTensorMode": ("torch._subclasses.fake_tensor", "runs a model that is only planned"),
    "TorchDispatchMode": ("torch.utils._python_dispatch", "sees every operation, for the memory planner"),
    "tree_flatten": ("torch.utils._pytree", "tensors in nested arguments, for pruning block by block"),
    "tree_leaves": ("torch.utils._pytree", "tensors in nested results, for the memory planner"),
    "tree_map_only": ("torch.utils._pytree", "moves tensors in nested arguments"),
    "cpp_extension": ("torch.utils", "compiles and loads extensions"),
    "FileBaton": ("torch.utils.file_baton", "its lock of an extension that is being compiled"),
    "_get_build_directory": ("torch.utils.cpp_extension", "where an extension is compiled"),
    "JIT_EXTENSION_VERSIONER": ("torch.utils.cpp_extension", "which extensions this process takes as built"),
    "adamw": ("torch.optim.adamw", "AdamW's step as a function: the reference of our masked one"),
}


def set_buffer(module, name: str, value) -> None:
    """Replace a buffer, which keeps whether it is persistent."""
    module._buffers[name] = value


def remove_parameter(module, name: str) -> None:
    """Take a parameter out of a module, so that its class may define a property of the same name."""
    del module._parameters[name]


def forget_build(name: str) -> None:
    """Have this process run the build of an extension again at its next load, which it skips after the first one."""
    from torch.utils.cpp_extension import JIT_EXTENSION_VERSIONER

    JIT_EXTENSION_VERSIONER.entries.pop(name, None)


__getattr__ = lookup("torch", NAMES)
