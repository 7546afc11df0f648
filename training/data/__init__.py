"""Labelled photo datasets: folder layouts, label tables, splits, torchvision sets, sample set."""
