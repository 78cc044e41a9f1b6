"""Models made of other models, and exported folders."""
