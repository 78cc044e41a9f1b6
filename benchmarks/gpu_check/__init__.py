"""Everything of this project that needs a GPU, run once in the order of worth: see docs/gpu_check.md."""
