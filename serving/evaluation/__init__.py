"""Comparison of a table of scores with true labels."""
