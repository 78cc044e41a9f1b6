"""Pruning a model: scores, calibration, block by block."""
