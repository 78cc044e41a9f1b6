"""Expert, sequence and tensor parallelism, and which features of a run can be combined."""
