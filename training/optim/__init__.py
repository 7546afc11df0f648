"""Optimizers, learning-rate schedules, weight averaging, and the learning-rate range test."""
