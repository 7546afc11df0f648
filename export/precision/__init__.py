"""Reduced precisions: make int8 and fp16 graphs, and keep those that are accurate and fast."""
