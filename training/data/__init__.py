"""Labelled photo datasets: find and split photos, torchvision's datasets, the sample dataset."""
