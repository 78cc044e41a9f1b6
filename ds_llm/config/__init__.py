"""The configuration of a run: typed sections, one file, DeepSpeed's JSON made of it."""
