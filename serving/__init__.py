"""Inference: bundles, the HTTP service and scoring.

Does not import training or export. Only `inference.torchscript` imports torch, when it is used.
"""

__version__ = "0.1.0"
