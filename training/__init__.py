"""Training: fine-tune a network on labelled photos and save a checkpoint.

Imports serving's decoder and preprocessing, never export.
"""
