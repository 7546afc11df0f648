"""Run ablations: train a recipe with single techniques changed, and compare the accuracies."""
