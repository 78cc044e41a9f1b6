"""DeepSpeed trainer for language models."""
