"""Selects rows to train on, by their scores and clusters."""
