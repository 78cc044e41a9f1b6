"""Scores of data by models, computed once by all ranks together and kept on disk."""
