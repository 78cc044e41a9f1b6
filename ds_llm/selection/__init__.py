"""Choosing what to train on by the scores of its rows."""
