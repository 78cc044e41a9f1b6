"""Searches over a run's configuration keys: W&B sweep files, run by Optuna on this machine or by W&B's own agents."""
