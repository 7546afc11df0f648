"""Reduced precisions: int8 and fp16 variants of the graph, and the choice which to keep."""
