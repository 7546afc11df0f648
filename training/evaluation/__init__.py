"""Evaluation of a checkpoint on held-out photos."""
