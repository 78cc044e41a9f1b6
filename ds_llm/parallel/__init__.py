"""Sharing one model or one row between processes: experts, sequences, tensors, and which of them go together."""
