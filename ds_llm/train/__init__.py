"""The training loop, what it records, and the modes."""
