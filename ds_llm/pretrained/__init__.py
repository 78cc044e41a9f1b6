"""Pretrained models: finding, loading, adapters, saving."""
