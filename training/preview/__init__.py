"""Inspect a data set, an augmentation or the layers of a network before training."""
