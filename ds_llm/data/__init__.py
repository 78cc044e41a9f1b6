"""From raw text to token files and batches."""
