"""The training loop, its records, and the training modes."""
