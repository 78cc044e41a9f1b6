"""Evaluation: perplexity, generated answers, benchmarks of lm-eval."""
