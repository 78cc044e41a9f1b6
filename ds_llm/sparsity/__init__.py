"""Pruning of language models, and training of what is left."""
