"""Losses that several modes or commands share."""
