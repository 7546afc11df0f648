"""Inference: bundles, the HTTP service and scoring. Never imports torch, training or export."""

__version__ = "0.1.0"
