"""Random changes to training photos, a whole batch at a time, as one warp and one lighting change.

Every draw is a function of (seed, view, photo), never of the order of batches: the same view of a
photo is the same picture whenever it is asked for, which is what lets its activations be cached.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.options import AugmentConfig


def draw(config: AugmentConfig, aspect: Tensor, seed: int, view: int) -> tuple[Tensor, Tensor]:
    """Draw one view of every photo.

    Args:
        config: Ranges.
        aspect: float32 [N], width over height.
        seed, view: Which draw.

    Returns:
        warp: float32 [N, 2, 3], output square -> photo, both in [-1, 1] coordinates.
        light: float32 [N, 2], contrast factor and brightness shift in units of the full range.
    """
    rng = np.random.default_rng([seed, view])
    n = len(aspect)
    low, high = config.scale
    side = torch.from_numpy(np.sqrt(rng.uniform(low, high, n)))
    stretch = torch.from_numpy(np.exp(rng.uniform(-1, 1, n) * math.log(config.ratio) / 2))
    angle = torch.from_numpy(np.radians(rng.uniform(-1, 1, n) * config.max_rotate))
    where = torch.from_numpy(rng.uniform(-1, 1, (n, 2)))
    mirror = (
        torch.from_numpy(np.where(rng.random(n) < 0.5, -1.0, 1.0))
        if config.flip == "horizontal"
        else 1.0
    )
    light = 1 + torch.from_numpy(rng.uniform(-1, 1, (n, 2))) * config.max_lighting

    # In units of the short side: the photo is width x height, the crop's half sides are hx, hy.
    width, height = aspect.double().clamp(min=1), (1 / aspect.double()).clamp(min=1)
    hx = torch.minimum(side * stretch, width) / 2
    hy = torch.minimum(side / stretch, height) / 2
    x = where[:, 0] * (width / 2 - hx)
    y = where[:, 1] * (height / 2 - hy)
    cos, sin = torch.cos(angle), torch.sin(angle)
    across = torch.stack([mirror * hx * cos, -hy * sin, x], dim=1) / (width / 2)[:, None]
    down = torch.stack([mirror * hx * sin, hy * cos, y], dim=1) / (height / 2)[:, None]
    light = torch.stack([light[:, 0], light[:, 1] - 1], dim=1)
    return torch.stack([across, down], dim=1).float(), light.float()


def apply(pixels: Tensor, warp: Tensor, light: Tensor, size: int) -> Tensor:
    """Cut and light a batch: uint8 [N, S, S, 3] -> float32 [N, size, size, 3] in 0..255."""
    images = pixels.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(warp, [len(pixels), 3, size, size], align_corners=False)
    # Rotation looks past the edge; a mirrored edge is a picture, a black corner is a clue.
    cut = F.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    contrast, shift = light[:, 0, None, None, None], light[:, 1, None, None, None]
    mean = cut.mean(dim=(1, 2, 3), keepdim=True)
    cut = (cut - mean) * contrast + mean + shift * 255
    return cut.clamp_(0, 255).permute(0, 2, 3, 1)
