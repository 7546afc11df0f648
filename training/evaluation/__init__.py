"""Evaluate a checkpoint on held-out photos: metrics, test-time augmentation, CSV output."""
