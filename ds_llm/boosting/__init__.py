"""The boosting recipe: rows drawn by entropy, models that vote."""
