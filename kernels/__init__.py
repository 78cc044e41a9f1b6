"""Triton kernels and their torch references, imported as `ds_llm.kernels`.

This file imports nothing: transformers looks for a top-level package called `kernels` and would import this one when
a program is started from the repository root.
"""
