"""Optimizers, learning-rate schedules, weight averaging, the learning-rate range test."""
