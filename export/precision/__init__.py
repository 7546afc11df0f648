"""Reduced precisions: make int8 and fp16 graphs, and choose which of them to keep."""
