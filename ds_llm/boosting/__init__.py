"""The boosting recipe: rows resampled by entropy, models that vote."""
