"""Recipes: schema, defaults, loading, error messages."""
