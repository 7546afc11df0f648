"""Cached outputs of frozen layers, and the data loaders that use them."""
