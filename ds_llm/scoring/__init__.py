"""Scores of data sets by models, computed by all ranks together and kept on disk."""
