"""DeepSpeed behind one class. Only this room, `ds_llm.parallel` and `ds_llm.compat` import it."""

import os

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would find out too, with a warning
