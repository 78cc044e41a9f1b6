"""The folders of checkpoints, and whether a run may continue from one."""
