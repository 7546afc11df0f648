"""Recipes (training options in TOML files): schema, defaults, loading and error messages."""
