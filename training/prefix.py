"""The frozen part of a network: run faster than as it was trained, and known by what is in it."""

from __future__ import annotations

import hashlib

import torch
import torchvision
from torch import Tensor, nn
from torch.fx.experimental import optimization

from training.freeze import has_batchnorm


def fused(prefix: nn.Module) -> nn.Module:
    """A copy with its BatchNorms folded into the convolutions before them, where torch.fx can.

    Args:
        prefix: A function without state: all of it in eval mode.

    Returns:
        Equal to `prefix` but for rounding, at the weights it has now; `prefix` itself where there
        is nothing to fold or torch.fx can't trace it.
    """
    if not has_batchnorm(prefix):
        return prefix
    try:
        folded = optimization.fuse(prefix)
    except Exception:  # whatever a network does that can't be traced: it runs as it is
        return prefix
    return folded.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def digest(prefix: nn.Module) -> bytes:
    """What decides the outputs of a frozen network: its layers, weights, and what computes them."""
    known = hashlib.sha256()
    machine = [torch.__version__, torchvision.__version__, torch.get_num_threads()]
    capability = torch.backends.cpu.get_cpu_capability()
    known.update(repr((repr(prefix), machine, capability)).encode())
    for name, value in prefix.state_dict().items():
        known.update(name.encode())
        known.update(_bytes(value))
    return known.digest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
