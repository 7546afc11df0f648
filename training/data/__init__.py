"""Datasets: folder layouts, tables, splits, known sets, the built-in sample."""
