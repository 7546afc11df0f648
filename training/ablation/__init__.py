"""Ablation: train a recipe with one technique added, removed or changed per row of a table."""
