"""Inference: bundles, the HTTP service, and scoring of many images.

This package does not import `training` or `export`. Only `serving.inference.torchscript` imports
torch, and only when a TorchScript graph is loaded.
"""

__version__ = "0.1.0"
