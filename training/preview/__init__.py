"""Inspect data and network before training."""
