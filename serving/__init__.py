"""The ground floor: what production runs. Never imports torch, training or export."""

__version__ = "0.1.0"
