"""Metrics of a score table against true labels."""
