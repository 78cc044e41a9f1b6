"""Proofs that a user's model trains, scores and generates here as plain torch and transformers do."""
