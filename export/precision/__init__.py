"""Reduced precisions: int8 and fp16 graphs, and the choice of those to keep."""
