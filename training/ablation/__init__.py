"""Ablation: one recipe trained with each technique left out, as a table."""
